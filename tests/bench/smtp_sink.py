"""The quickest SMTP server in Python: it accepts all, and keeps nothing. For measuring clients.

``python -m tests.bench.smtp_sink [STATE]`` listens on a free port of 127.0.0.1 and prints it. STATE is a file
of two 64-bit integers that it maps. It counts its mails in the first, and the second is how many milliseconds
each mail takes until its reply.
"""

from __future__ import annotations

import asyncio
import mmap
import sys
from pathlib import Path
from typing import cast

import uvloop

__all__ = ["Sink"]

_EHLO = b"250-sink\r\n250-PIPELINING\r\n250-SIZE 0\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n"
_TAKEN = b"250 2.0.0 Ok: queued\r\n"


class Sink(asyncio.Protocol):
    """One session. Commands may come pipelined; a message ends at a dot alone on a line."""

    def __init__(self, state: memoryview) -> None:
        self._state = state
        self._buffer = b""
        self._in_data = False
        self._taking = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(b"220 sink\r\n")

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if not self._taking:
            self._answer()

    def _answer(self) -> None:
        buffer, out = self._buffer, b""
        while buffer:
            if self._in_data:
                end = buffer.find(b"\r\n.\r\n")
                if end < 0:
                    break
                buffer = buffer[end + 5 :]
                self._in_data = False
                if milliseconds := self._state[1]:
                    self._taking = True
                    asyncio.get_running_loop().call_later(milliseconds / 1000, self._take)
                    break
                self._state[0] += 1
                out += _TAKEN
                continue
            line, found, rest = buffer.partition(b"\r\n")
            if not found:
                break
            buffer = rest
            verb = line[:4].upper()
            if verb == b"DATA":
                self._in_data = True
                out += b"354 go on\r\n"
            elif verb == b"EHLO":
                out += _EHLO
            elif verb == b"QUIT":
                self._transport.write(out + b"221 bye\r\n")
                self._transport.close()
                return
            else:
                out += b"250 2.1.0 Ok\r\n"
        self._buffer = buffer
        if out:
            self._transport.write(out)

    def _take(self) -> None:
        """Reply to the message, and go on with what came meanwhile."""
        self._taking = False
        if not self._transport.is_closing():
            self._state[0] += 1
            self._transport.write(_TAKEN)
            self._answer()


def _state(arguments: list[str]) -> memoryview:
    if not arguments:
        return memoryview(bytearray(16)).cast("q")
    with Path(arguments[0]).open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 16)).cast("q")


async def _serve(state: memoryview) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Sink(state), "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1])
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(_state(sys.argv[1:])))
