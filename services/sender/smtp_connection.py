"""One connection to a mail server: it writes bytes, reads replies, and knows what is certain when it is
lost."""

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

from services.sender.masking import Mask
from services.sender.replies import Reply
from services.sender.reply_parser import GarbageError, ReplyParser

__all__ = ["SmtpConnection"]


class SmtpConnection(asyncio.Protocol):
    """Sends commands and waits for their replies. It raises for nothing that a server does.

    Data that comes without a command ends the connection. So no reply is ever taken for the reply to a later
    command; after STARTTLS that would be an attack (CVE-2011-0411).

    Whether the last byte of a message has left decides between "not sent" and "in doubt". The limits of the
    write buffer are so low that the transport reports any byte in it (`pause_writing`). While a byte is in
    it, the last byte was certainly not handed over. An empty buffer proves nothing. TLS takes a message as
    a whole and hides its own buffer, so over TLS a message that breaks off is in doubt.
    """

    __slots__ = (
        "_buffered",
        "_loop",
        "_on_lost",
        "_parser",
        "_replies",
        "_timeout",
        "_timer",
        "_waiter",
        "_wanted",
        "closed",
        "lost",
        "timed_out",
        "transport",
        "unparsed",
        "unsent",
    )

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = ReplyParser()
        self._replies: list[Reply] = []
        # The banner comes without a command, and may come before `greeting` is called.
        self._wanted = 1
        self._waiter: asyncio.Future[list[Reply]] | None = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._timeout = 0.0
        self._buffered = False
        self._on_lost: Callable[[], None] | None = None
        self.lost: str | None = None
        """Why the connection is over; None while it is not."""
        self.unparsed = ""
        """What the server had sent by then that was no whole reply, or was no reply to a command."""
        self.timed_out = False
        """Whether the connection is over because the server did not reply in time."""
        self.unsent = False
        """Whether some bytes were certainly not handed over when the last ``ask`` ended."""
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done when the transport has closed the socket."""

    async def greeting(self, timeout: float) -> list[Reply]:
        """Wait for the banner; the result is as in ``ask``."""
        return await self._answers(timeout, timeout)

    async def ask(
        self,
        data: bytes,
        count: int,
        timeout: float,
        *,
        flush_timeout: float | None = None,
        lenient: bool = False,
    ) -> list[Reply]:
        """Write ``data`` and wait for ``count`` replies.

        Args:
            timeout: seconds to wait for the replies once all is written.
            flush_timeout: seconds that writing may take; ``timeout`` if not given.
            lenient: lines without a code belong to the reply that follows, and do not end the connection.

        Returns:
            The replies. If there are fewer than ``count``, the connection is over, and ``lost`` says why.
            It was closed, broke or timed out, or the server sent 421, garbage or too many replies. An
            unfinished reply whose code can be read is among them.

        Raises:
            asyncio.CancelledError: the connection is aborted; ``replies`` has the replies so far.
        """
        self._replies = []
        if self.lost is not None:
            return []
        self._parser.lenient = lenient
        self._wanted = count
        self._waiter = self._loop.create_future()
        self.transport.write(data)
        return await self._answers(timeout, flush_timeout or timeout)

    @property
    def mask(self) -> Mask:
        """The mask for everything that the server sends, so that no secret is shown or logged."""
        return self._parser.mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        self._parser.mask = mask

    @property
    def replies(self) -> list[Reply]:
        """The replies to the last ``ask`` so far."""
        return self._replies

    async def start_tls(self, context: ssl.SSLContext, host: str, timeout: float) -> None:
        """Encrypt the connection with TLS.

        Raises:
            OSError: the handshake failed or took longer than ``timeout`` seconds; the connection is over.
        """
        try:
            transport = await self._loop.start_tls(
                self.transport, self, context, server_hostname=host, ssl_handshake_timeout=timeout
            )
        except BaseException as error:
            self.abort(f"TLS handshake: {error}")
            raise
        if transport is None:
            self.abort("connection lost in the TLS handshake")
            raise ConnectionError(self.lost)
        self._use(transport)

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Have ``on_lost`` called once when the connection is over; at once if it is over already."""
        if self.lost is None:
            self._on_lost = on_lost
        else:
            on_lost()

    def abort(self, cause: str) -> None:
        """End the connection at once; bytes that are still buffered never leave."""
        if self.lost is None:
            unfinished, unparsed = self._parser.unfinished, self._parser.unparsed
            if unfinished is not None and self._waiter is not None and len(self._replies) < self._wanted:
                self._replies.append(unfinished)
            self.lost = f"{cause}, after {unparsed[:200]!r}" if unparsed else cause
            self.unparsed = self.unparsed or unparsed
            self.unsent = self._buffered
            if self._on_lost is not None:
                self._on_lost()
        self.transport.abort()
        self._wake()

    def quit(self, timeout: float) -> None:
        """Send QUIT; close the connection after its reply or after ``timeout`` seconds. Does not wait."""
        if self.lost is None:
            self.lost = "closed by us"
            if self._on_lost is not None:
                self._on_lost()
            self.transport.write(b"QUIT\r\n")
            self._timer = self._loop.call_later(timeout, self.transport.abort)

    async def _answers(self, timeout: float, flush_timeout: float) -> list[Reply]:
        waiter = cast(asyncio.Future[list[Reply]], self._waiter)
        self._timeout = timeout
        self._timer = self._loop.call_later(flush_timeout if self._buffered else timeout, self._timed_out)
        try:
            return await waiter
        except asyncio.CancelledError:
            self.abort("cancelled")
            raise
        finally:
            self._timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(self._replies)

    def _timed_out(self) -> None:
        if self._buffered:
            # uvloop reports a finished write in the next turn of the loop: check again after it.
            self._loop.call_soon(self._give_up)
        else:
            self._give_up()

    def _give_up(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self.timed_out = True
            self.abort("timed out")

    def _use(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # Not 0: the TLS transports would then report an empty buffer as full.
        self.transport.set_write_buffer_limits(high=1, low=0)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._use(transport)

    def data_received(self, data: bytes) -> None:
        if self.lost is not None:
            self.transport.abort()
            return
        over: str | None = None
        try:
            replies = self._parser.feed(data)
        except GarbageError as error:
            replies, over = error.replies, str(error)
            self.unparsed = error.unparsed
        waiter = self._waiter
        if waiter is None or waiter.done():
            if over is not None or replies or not self._parser.empty:
                self.abort(over or (str(replies[0]) if replies else "data that was not asked for"))
            return
        self._replies += replies
        count = len(self._replies)
        for reply in replies:
            if reply.closes:
                over = str(reply)
        if over is None and count < self._wanted:
            return
        if over is None and self._buffered:
            over = "the server answered before it had everything"
        if over is None and (count > self._wanted or not self._parser.empty):
            over = "more replies than commands"
            if count > self._wanted:
                self.unparsed = str(self._replies[self._wanted])
                over += f": {self.unparsed!r}"
        if over is not None:
            del self._replies[self._wanted :]
            self.abort(over)
        else:
            self.unsent = False
            self._wake()

    def eof_received(self) -> None:
        # Closing would first flush the buffer: the server would have a mail that counts as not sent.
        self.abort("connection closed by the server")

    def connection_lost(self, exc: Exception | None) -> None:
        self.abort(str(exc) if exc and str(exc) else "connection lost")
        if self._timer is not None:
            self._timer.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        self._buffered = True

    def resume_writing(self) -> None:
        self._buffered = False
        if self._waiter is not None and self._timer is not None and not self._waiter.done():
            self._timer.cancel()
            self._timer = self._loop.call_later(self._timeout, self._timed_out)
