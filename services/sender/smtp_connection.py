"""One connection to a mail server: it writes bytes, reads replies, and knows what is certain when it is
lost."""

import asyncio
import ssl
from collections.abc import Callable
from typing import cast

import structlog

from services.sender.masking import Mask
from services.sender.replies import Reply
from services.sender.reply_parser import GarbageError, ReplyParser
from services.sender.smtp_exchanges import Exchange, Exchanges, OnReplies

__all__ = ["SmtpConnection"]

_log = structlog.get_logger()


class SmtpConnection(asyncio.Protocol):
    """Sends commands and passes their replies on. It raises for nothing that a server does.

    A caller says by ``expect`` who gets the replies, and then writes the commands. Several exchanges may be
    written at once (RFC 2920); their replies come in the same order.

    Data that comes without a command ends the connection. So no reply is ever taken for the reply to a later
    command; after STARTTLS that would be an attack (CVE-2011-0411).

    Whether the last byte of a message has left decides between "not sent" and "in doubt". The limits of the
    write buffer are so low that the transport reports any byte in it (`pause_writing`). While a byte is in
    it, the last byte was certainly not handed over. An empty buffer proves nothing. TLS takes a message as
    a whole and hides its own buffer, so over TLS a message that breaks off is in doubt. So is one that was
    written together with commands, which may be what the buffer holds.
    """

    __slots__ = (
        "_banner",
        "_buffered",
        "_deadline",
        "_exchanges",
        "_followed",
        "_loop",
        "_on_lost",
        "_parser",
        "_timer",
        "_timer_at",
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
        self._exchanges = Exchanges()
        self._buffered = self._followed = False
        # One timer for all deadlines: when it fires too early, it is set anew.
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._on_lost: Callable[[], None] | None = None
        self.lost: str | None = None
        """Why the connection is over; None while it is not."""
        self.unparsed = ""
        """What the server had sent by then that was no whole reply, or was no reply to a command."""
        self.timed_out = False
        """Whether the connection is over because the server did not reply in time."""
        self.unsent = False
        """Whether some bytes of what was written last were certainly not handed over when it was lost."""
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done when the transport has closed the socket."""
        # The banner comes without a command, and may come before `greeting` is called.
        self._banner = self._expect_soon(0.0)

    @property
    def mask(self) -> Mask:
        """The mask for everything that the server sends, so that no secret is shown or logged."""
        return self._parser.mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        self._parser.mask = mask

    @property
    def pending(self) -> bool:
        """Whether replies are outstanding."""
        return bool(self._exchanges)

    # While a session opens

    async def greeting(self, timeout: float) -> list[Reply]:
        """Wait for the banner; the result is as in ``ask``."""
        if self._exchanges:
            self._exchanges[0].timeout = timeout
            self._set_deadline(timeout)
        return await self._result(self._banner)

    async def ask(self, data: bytes, timeout: float) -> list[Reply]:
        """Write a command and wait for its reply, for ``timeout`` seconds.

        Returns:
            The reply; nothing if the connection is over without one.

        Raises:
            asyncio.CancelledError: the connection is aborted.
        """
        if self.lost is not None:
            return []
        answer = self._expect_soon(timeout)
        self.write(data)
        return await self._result(answer)

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

    # For mails

    def expect(self, count: int, timeout: float, on_replies: OnReplies, *, lenient: bool = False) -> None:
        """Have ``on_replies`` called once, with the ``count`` replies to what is written next.

        With fewer replies, the connection is over, and ``lost`` says why. It was closed, broke or timed out,
        or the server sent 421, garbage or too many replies. An unfinished reply whose code can be read is
        among them.

        Args:
            timeout: seconds to wait for the replies once all is written and the exchanges before are over.
            lenient: lines without a code belong to the reply that follows, and do not end the connection.
        """
        if lenient:
            self._parser.lenient = count
        self._exchanges.append(Exchange(count, timeout, on_replies))

    def write(self, *data: bytes, flush_timeout: float | None = None, followed: bool = False) -> None:
        """Write what the exchanges that were expected since the last write consist of.

        Args:
            flush_timeout: seconds that writing may take; the first exchange's timeout if not given.
            followed: a message comes first, and commands follow it.
        """
        self._followed = followed
        if len(data) == 1:
            self.transport.write(data[0])
        else:
            self.transport.writelines(data)
        if self._exchanges:
            timeout = self._exchanges[0].timeout
            self._set_deadline(flush_timeout if self._buffered and flush_timeout is not None else timeout)

    # Its end

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Have ``on_lost`` called once when the connection is over; at once if it is over already."""
        if self.lost is None:
            self._on_lost = on_lost
        else:
            on_lost()

    def abort(self, cause: str) -> None:
        """End the connection at once; bytes that are still buffered never leave.

        All exchanges end with the replies that they have, before this returns.
        """
        if self.lost is not None:
            self.transport.abort()
            return
        unfinished, unparsed = self._parser.unfinished, self._parser.unparsed
        if unfinished is not None:
            self._exchanges.take_unfinished(unfinished)
        self.unsent = self._buffered and not self._followed
        self.unparsed = self.unparsed or unparsed
        self._end(f"{cause}, after {unparsed[:200]!r}" if unparsed else cause)
        self.transport.abort()
        while self._exchanges:
            self._answer(self._exchanges.popleft())

    def quit(self, timeout: float) -> None:
        """Send QUIT; close the connection after its reply or after ``timeout`` seconds. Does not wait.

        Where replies are outstanding, the connection is aborted: QUIT could be taken for a message.
        """
        if self.lost is not None:
            return
        if self._exchanges:
            self.abort("closed by us")
            return
        self._end("closed by us")
        self.transport.write(b"QUIT\r\n")
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(timeout, self.transport.abort)

    def _end(self, cause: str) -> None:
        self.lost = cause
        if self._on_lost is not None:
            self._on_lost()

    # Replies

    def _expect_soon(self, timeout: float) -> asyncio.Future[list[Reply]]:
        answer: asyncio.Future[list[Reply]] = self._loop.create_future()
        self.expect(1, timeout, lambda replies: None if answer.done() else answer.set_result(replies))
        return answer

    async def _result(self, answer: asyncio.Future[list[Reply]]) -> list[Reply]:
        try:
            return await answer
        except asyncio.CancelledError:
            self.abort("cancelled")
            raise

    def _answer(self, exchange: Exchange) -> None:
        try:
            exchange.on_replies(exchange.replies)
        except Exception:
            _log.exception("smtp_internal_error")
            self.abort("internal error")

    # Deadlines

    def _set_deadline(self, seconds: float) -> None:
        self._deadline = deadline = self._loop.time() + seconds
        if self._timer is None or deadline < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._set_timer()

    def _set_timer(self) -> None:
        self._timer_at = self._deadline
        self._timer = self._loop.call_at(self._deadline, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        if not self._exchanges:
            return
        if self._loop.time() < self._deadline:
            self._set_timer()
        elif self._buffered:
            # uvloop reports a finished write in the next turn of the loop: check again after it.
            self._loop.call_soon(self._give_up, self._exchanges[0])
        else:
            self._give_up(self._exchanges[0])

    def _give_up(self, exchange: Exchange) -> None:
        if self._exchanges and self._exchanges[0] is exchange:
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
        garbage: str | None = None
        try:
            replies = self._parser.feed(data)
        except GarbageError as error:
            replies, garbage = error.replies, str(error)
            self.unparsed = error.unparsed
        exchanges = self._exchanges
        over, extra = exchanges.take(replies)
        over = over or garbage
        if not exchanges:
            if over is not None or extra is not None or not self._parser.empty:
                self.abort(over or (str(extra) if extra is not None else "data that was not asked for"))
            return
        if over is None and exchanges[0].answered:
            if self._buffered and not self._followed:
                over = "the server answered before it had everything"
            elif extra is not None:
                self.unparsed = str(extra)
                over = f"more replies than commands: {self.unparsed!r}"
            elif exchanges[-1].answered and not self._parser.empty:
                over = "more replies than commands"
        if over is not None:
            self.abort(over)
            return
        while exchanges and exchanges[0].answered:
            exchange = exchanges.popleft()
            if exchanges:
                self._set_deadline(exchanges[0].timeout)
            self._answer(exchange)

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
        # The TLS transports also call this without a pause before.
        if self._buffered and self._exchanges:
            self._set_deadline(self._exchanges[0].timeout)
        self._buffered = False
