"""TCP proxies between the services and their servers. Each can reset, stop or slow down its connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from concurrent.futures import Future
from typing import Any, Literal

import uvloop

__all__ = ["Mode", "Proxies"]

Mode = Literal["pass", "reset", "blackhole", "slow"]

_PIECE = 1 << 16
_SLOW = 0.15
_CUT_EVERY = 1.0


class _Link:
    """One listening port and its connections. Belongs to the loop of the proxies."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = host, port
        self._mode: Mode = "pass"
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._open: set[asyncio.StreamWriter] = set()
        self._cutting: asyncio.Task[None] | None = None

    async def listen(self, port: int) -> int:
        server = await asyncio.start_server(self._carry, "127.0.0.1", port, backlog=512)
        return int(server.sockets[0].getsockname()[1])

    def set(self, mode: Mode) -> None:
        self._mode = mode
        if mode == "blackhole":
            self._flowing.clear()
        else:
            self._flowing.set()
        if self._cutting is not None:
            self._cutting.cancel()
            self._cutting = None
        if mode == "reset":
            self._cutting = asyncio.get_running_loop().create_task(self._cut())

    async def _cut(self) -> None:
        while True:
            for writer in list(self._open):
                _reset(writer)
            await asyncio.sleep(_CUT_EVERY)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A connection that fails on one side is reset on the other, which then sees what the server would
        # show.
        self._open.add(writer)
        upstream: asyncio.StreamWriter | None = None
        try:
            await self._flowing.wait()
            back, upstream = await asyncio.open_connection(*self._upstream)
            self._open.add(upstream)
            ways = [
                asyncio.ensure_future(self._pump(reader, upstream)),
                asyncio.ensure_future(self._pump(back, writer)),
            ]
            await asyncio.wait(ways)
        except (OSError, asyncio.CancelledError):
            # Cancelled when the proxies close. asyncio would report an exception for each connection.
            _reset(writer)
        finally:
            for one in filter(None, (writer, upstream)):
                self._open.discard(one)
                one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_PIECE):
                if self._mode == "slow":
                    await asyncio.sleep(_SLOW)
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
            await self._flowing.wait()
            writer.write_eof()
        except (OSError, RuntimeError):
            _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection at once with a RST."""
    # ValueError: the socket is closed already.
    with contextlib.suppress(OSError, AttributeError, ValueError):
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    writer.transport.abort()


class Proxies:
    """Named proxies on a thread of their own. All methods block for a moment."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._links: dict[str, _Link] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()

    def add(self, name: str, host: str, port: int, listen: int = 0) -> int:
        """Forward connections to host:port and return the proxy's port. Several proxies may share a name."""

        async def make() -> tuple[_Link, int]:
            link = _Link(host, port)
            return link, await link.listen(listen)

        link, listening = self._do(make())
        self._links[f"{name}#{listening}"] = link
        return int(listening)

    def set(self, name: str, mode: Mode) -> None:
        """Set the mode of all connections of `name`.

        `reset` resets them once a second, `blackhole` holds all data back until the mode changes, and `slow`
        delays each piece.
        """

        async def change() -> None:
            for key, link in self._links.items():
                if key.partition("#")[0] == name:
                    link.set(mode)

        self._do(change())

    def close(self) -> None:
        """End all connections and the thread."""

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _do(self, work: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(10)
