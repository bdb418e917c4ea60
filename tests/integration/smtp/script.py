"""A mail server that follows a test's script line by line, over real sockets."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from services.sender.replies import SendResult
from services.sender.smtp_pool import Limits, Relay, SmtpPool, Timeouts, Tls

__all__ = [
    "FROM",
    "MESSAGE",
    "QUICK",
    "TO",
    "Conversation",
    "Script",
    "ScriptedServer",
    "pool_for",
    "result_of",
    "scripted",
    "send",
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
        self.heard: list[bytes] = []
        """Every line that the client sent, without its CRLF."""

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
        data = await asyncio.wait_for(self._reader.readline(), TIMEOUT)
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

    async def message(self) -> bytes:
        """Return the message up to its dot, still dot-stuffed."""
        data = bytearray(b"\r\n" + await asyncio.wait_for(self._reader.readuntil(b"\r\n"), TIMEOUT))
        while not data.endswith(b"\r\n.\r\n"):
            more = await asyncio.wait_for(self._reader.read(1 << 20), TIMEOUT)
            assert more, "the stream ended inside the message"
            data += more
        return bytes(data[2:-3])

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
        assert await asyncio.wait_for(self._reader.read(1), TIMEOUT)

    async def drained(self) -> int:
        """Read until the client has closed; return the number of bytes."""
        count = 0
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


async def send(
    pool: SmtpPool, message: bytes = MESSAGE, guard: Callable[[], bool] = lambda: True
) -> SendResult:
    return await pool.send(FROM, TO, message, guard)


async def result_of(script: Script, message: bytes = MESSAGE, **settings: Any) -> SendResult:
    async with scripted(script) as server, pool_for(server, **settings) as pool:
        return await send(pool, message)
