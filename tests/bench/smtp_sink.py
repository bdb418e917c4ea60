"""The quickest mail server that still speaks SMTP: accepts all, keeps nothing. For measuring clients.

``python -m tests.bench.smtp_sink`` listens on a free port of 127.0.0.1 and prints it.
"""

import asyncio
import sys
from typing import cast

import uvloop

__all__ = ["Sink"]

_EHLO = b"250-sink\r\n250-PIPELINING\r\n250-SIZE 0\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n"


class Sink(asyncio.Protocol):
    """One session. Commands may come pipelined; a message ends at a dot alone on a line."""

    def __init__(self) -> None:
        self._buffer = b""
        self._in_data = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(b"220 sink\r\n")

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        out = b""
        while buffer:
            if self._in_data:
                end = buffer.find(b"\r\n.\r\n")
                if end < 0:
                    break
                buffer = buffer[end + 5 :]
                self._in_data = False
                out += b"250 2.0.0 Ok: queued\r\n"
                continue
            line, found, rest = buffer.partition(b"\r\n")
            if not found:
                break
            buffer = rest
            verb = line[:4]
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


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(Sink, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1])
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
