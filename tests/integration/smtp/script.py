"""A mail server that follows a test's script line by line, over real sockets."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from services.sender.replies import SendResult
from services.sender.smtp_pool import Limits, OutgoingMail, Relay, SmtpPool, Timeouts, Tls

__all__ = [
    "FROM",
    "MESSAGE",
    "QUICK",
    "TO",
    "Conversation",
    "Script",
    "ScriptedServer",
    "Sending",
    "count_chained",
    "pool_for",
    "result_of",
    "scripted",
    "send",
    "serving",
    "take_mails",
    "until",
]

FROM, TO = "shop@example.org", "ann@example.net"
MESSAGE = b"Subject: hi\r\n\r\nhello\r\n"
QUICK = Timeouts(connect=20, tls=20, opening=20, command=20, data=20, block=20, after_dot=20, quit=1)
TIMEOUT = 30.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition for which there is no event."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Conversation:
    """One connection, from the server's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._ahead = bytearray()
        self.heard: list[bytes] = []
        """Every line that the client sent, without its CRLF."""
        self.messages = 0
        """How many messages the client sent."""

    async def say(self, *lines: str) -> None:
        """Write all lines at once."""
        await self.raw("".join(f"{line}\r\n" for line in lines).encode())

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def slowly(self, *lines: str) -> None:
        """Write lines byte by byte, each in a packet of its own."""
        for byte in "".join(f"{line}\r\n" for line in lines).encode():
            await self.raw(bytes([byte]))
            await asyncio.sleep(0)

    async def line(self) -> bytes:
        """Return the next line; empty at the end of the stream."""
        data = await self._up_to(b"\n")
        line = data.removesuffix(b"\r\n")
        if data:
            assert data.endswith(b"\r\n"), data
            self.heard.append(line)
        return line

    async def expect(self, *starts: str) -> None:
        """Read one line for each of ``starts``."""
        for start in starts:
            line = await self.line()
            assert line.startswith(start.encode()), f"expected {start!r}, heard {line!r}"

    async def greet(self, *extensions: str) -> None:
        """Send the banner and answer EHLO."""
        await self.say("220 scripted")
        await self.expect("EHLO ")
        lines = ["scripted", *extensions]
        await self.say(*(f"250-{line}" for line in lines[:-1]), f"250 {lines[-1]}")

    async def envelope(self) -> None:
        """Accept MAIL, RCPT and DATA, which come together."""
        await self.expect("MAIL FROM:", "RCPT TO:", "DATA")
        await self.say("250 ok", "250 ok", "354 go on")

    async def message(self, *, or_end: bool = False) -> bytes:
        """Return the message up to its dot, still dot-stuffed.

        With `or_end` the client may leave instead; the result is then empty.
        """
        self._ahead[:0] = b"\r\n"
        data = await self._up_to(b"\r\n.\r\n")
        if or_end and data == b"\r\n":
            return b""
        assert data.endswith(b"\r\n.\r\n"), "the stream ended inside the message"
        self.messages += 1
        return data[2:-3]

    async def _up_to(self, end: bytes) -> bytes:
        """Return the bytes up to `end`; what there is at the end of the stream."""
        looked = 0
        while (at := self._ahead.find(end, max(0, looked - len(end)))) < 0:
            looked = len(self._ahead)
            data = await asyncio.wait_for(self._reader.read(1 << 20), TIMEOUT)
            if not data:
                break
            self._ahead += data
        size = at + len(end) if at >= 0 else len(self._ahead)
        data = bytes(self._ahead[:size])
        del self._ahead[:size]
        return data

    async def mail(self) -> bytes:
        """Accept one whole transaction."""
        await self.envelope()
        message = await self.message()
        await self.say("250 2.0.0 queued")
        return message

    async def perhaps(self) -> None:
        """Accept one transaction if the client begins it, then wait for the end."""
        line = await self.line()
        if line.startswith(b"MAIL"):
            await self.expect("RCPT TO:", "DATA")
            await self.say("250 ok", "250 ok", "354 go on")
            await self.message()
            await self.say("250 queued")
            await self.ended()

    async def ended(self) -> None:
        """Wait until the client closes. It may only send QUIT before."""
        with contextlib.suppress(ConnectionError):
            while line := await self.line():
                assert line == b"QUIT", f"heard {line!r}"
                await self.say("221 bye")

    async def something(self) -> None:
        """Wait for any byte."""
        assert self._ahead or await asyncio.wait_for(self._reader.read(1), TIMEOUT)

    async def drained(self) -> int:
        """Read until the client has closed; return the number of bytes."""
        count = len(self._ahead)
        with contextlib.suppress(ConnectionError):
            while data := await asyncio.wait_for(self._reader.read(1 << 20), TIMEOUT):
                count += len(data)
        return count

    async def start_tls(self, context: ssl.SSLContext) -> None:
        await self._writer.start_tls(context)

    def half_close(self) -> None:
        """Close the server's direction; it still reads."""
        self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        self._writer.transport.abort()


Script = Callable[[Conversation], Awaitable[None]]


class ScriptedServer:
    """Runs the n-th script for the n-th connection, and the last one for all further ones."""

    def __init__(self, scripts: tuple[Script, ...]) -> None:
        self._scripts = scripts
        self._tasks: list[asyncio.Task[None]] = []
        self.conversations: list[Conversation] = []
        self.port = 0

    @property
    def connections(self) -> int:
        return len(self.conversations)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = Conversation(reader, writer)
        script = self._scripts[min(len(self.conversations), len(self._scripts) - 1)]
        self.conversations.append(conversation)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)
        try:
            await script(conversation)
        finally:
            writer.close()

    async def heard(self, number: int, line: bytes) -> None:
        """Wait until the last line of the conversation with this number is ``line``."""
        await until(lambda: self.conversations[number].heard[-1:] == [line])

    async def played(self) -> None:
        """Wait until every script has ended, and raise the error of any of them."""
        for task in self._tasks:
            await asyncio.wait_for(task, TIMEOUT)


@asynccontextmanager
async def scripted(*scripts: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[ScriptedServer]:
    """Serve the scripts on a free port. At the end all must have run to their end."""
    server = ScriptedServer(scripts)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
        await server.played()
    finally:
        listener.close()
        for task in server._tasks:
            task.cancel()
        await asyncio.gather(*server._tasks, return_exceptions=True)


@asynccontextmanager
async def pool_for(server: ScriptedServer, **settings: Any) -> AsyncIterator[SmtpPool]:
    timeouts = settings.pop("timeouts", QUICK)
    limits = settings.pop("limits", Limits(sessions=1, backoff=0.01))
    pool = SmtpPool(
        Relay("127.0.0.1", server.port, **({"tls": Tls.NONE} | settings)), limits=limits, timeouts=timeouts
    )
    try:
        yield pool
    finally:
        await pool.close(grace=0)


def count_chained(pool: SmtpPool) -> list[OutgoingMail]:
    """Return a list that gets each mail that the pool chains."""
    chained: list[OutgoingMail] = []
    chain = pool._dispatcher.chain

    def counted(mail: OutgoingMail) -> None:
        chained.append(mail)
        chain(mail)

    pool._dispatcher.chain = counted  # type: ignore[method-assign]
    return chained


class Sending:
    """A submitted mail and its results."""

    def __init__(
        self,
        pool: SmtpPool,
        message: bytes = MESSAGE,
        guard: Callable[[], bool] = lambda: True,
        *,
        mail_from: str = FROM,
        rcpt: str = TO,
    ) -> None:
        self.results: list[SendResult] = []
        self.pool = pool
        self.mail = OutgoingMail(mail_from, rcpt, message, guard, self.results.append)
        pool.submit(self.mail)
        assert not self.results, "never inside submit"

    async def result(self) -> SendResult:
        """Wait for the mail's only result."""
        await until(lambda: bool(self.results))
        [result] = self.results
        return result

    def withdraw(self) -> bool:
        return self.pool.withdraw(self.mail)

    def cut_off(self) -> SendResult:
        self.pool.cut_off(self.mail)
        [result] = self.results
        return result


async def send(
    pool: SmtpPool,
    message: bytes = MESSAGE,
    guard: Callable[[], bool] = lambda: True,
    *,
    mail_from: str = FROM,
    rcpt: str = TO,
) -> SendResult:
    """Send one mail and wait for its result."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[SendResult] = loop.create_future()
    pool.submit(OutgoingMail(mail_from, rcpt, message, guard, result.set_result))
    return await result


async def serving(c: Conversation) -> None:
    """Accept mails until the client leaves."""
    await c.greet("PIPELINING")
    await take_mails(c)


async def take_mails(c: Conversation) -> None:
    """Accept mails on an open session until the client leaves."""
    while (line := await c.line()) and line != b"QUIT":
        if line == b"RSET":
            await c.say("250 reset")
            continue
        assert line.startswith(b"MAIL FROM:"), line
        await c.expect("RCPT TO:", "DATA")
        await c.say("250 ok", "250 ok", "354 go on")
        await c.message()
        await c.say("250 queued")
    if line:
        await c.say("221 bye")


async def result_of(script: Script, message: bytes = MESSAGE, **settings: Any) -> SendResult:
    async with scripted(script) as server, pool_for(server, **settings) as pool:
        return await send(pool, message)
