"""The HTTP server of a service: /healthz (alive), /readyz (ready for work) and /metrics.

It has a thread of its own, so that it answers even while the event loop is busy. Connections and requests are
few, short and bounded: whoever sends half a request, or does not read, keeps nobody else away.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple, Self

import structlog
from prometheus_client import REGISTRY
from prometheus_client.exposition import choose_encoder

from services.common.forms import is_loopback

__all__ = ["Degraded", "HealthServer", "Heartbeat"]

log = structlog.get_logger(__name__)


class Degraded(str):
    """A problem that leaves the service ready."""

    __slots__ = ()


class Heartbeat:
    """Measures how long ago the loop last ran. A context manager; enter it on the loop's thread."""

    _EVERY = 0.5

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._last = time.monotonic()

    def age(self) -> float:
        """Return the seconds since the loop last ran, to within half a second."""
        return time.monotonic() - self._last

    def _beat(self) -> None:
        self._last = time.monotonic()
        self._timer = self._loop.call_later(self._EVERY, self._beat)

    def __enter__(self) -> Self:
        self._beat()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()


class _Response(NamedTuple):
    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain"


class HealthServer:
    """Serves the three paths until the context ends.

    `listen` is host:port (port 0: any free one). `problems` returns why the service is not ready, and as
    `Degraded` what is wrong although it is ready. Raises OSError if the port is taken.

    Problems and metrics are for operators: they are on this host, or have `operator_token`, if there is one.
    """

    # Longer than a garbage collection or a busy second, shorter than an orchestrator waits (seconds).
    _STUCK_AFTER = 15.0
    _MAX_CONNECTIONS = 100
    _MAX_REQUEST = 8192
    # For the request and the response together.
    _SECONDS = 5.0

    def __init__(
        self, listen: str, operator_token: str, heartbeat: Heartbeat, problems: Callable[[], list[str]]
    ) -> None:
        host, _, port = listen.rpartition(":")
        name = host.strip("[]")
        self._operator_token, self._heartbeat, self._problems = operator_token, heartbeat, problems
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        self._socket = socket.create_server((name, int(port)), family=family)
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._connections: dict[asyncio.Task[None], None] = {}
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(self._SECONDS)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, sock=self._socket, limit=self._MAX_REQUEST)
        await self._stopping.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= self._MAX_CONNECTIONS:
            # A request takes milliseconds, so the oldest connection is the one that waits for its client.
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.cancel()
        self._connections[task] = None
        try:
            async with asyncio.timeout(self._SECONDS):
                # `drain` then waits until all is sent.
                writer.transport.set_write_buffer_limits(0)
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._respond(head.decode("latin-1"), str(writer.get_extra_info("peername")[0])))
                await writer.drain()
                writer.write_eof()
        except (TimeoutError, OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            # Too slow, too long, or gone.
            pass
        except Exception:
            log.exception("unexpected")
        finally:
            self._connections.pop(task, None)
            writer.transport.abort()

    def _respond(self, head: str, peer: str) -> bytes:
        request, *lines = head.split("\r\n")
        split = (line.partition(":") for line in lines)
        fields = {name.strip().lower(): value.strip() for name, _, value in split}
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD"):
            found = _Response(HTTPStatus.METHOD_NOT_ALLOWED, b"GET or HEAD\n")
        else:
            found = self._find(path, fields, self._is_operator(peer, fields.get("authorization", "")))
        status, body, content_type = found
        headers = [
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Type: {content_type}",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *(["WWW-Authenticate: Bearer"] if status is HTTPStatus.UNAUTHORIZED else []),
        ]
        return "\r\n".join((*headers, "", "")).encode() + (b"" if method == "HEAD" else body)

    def _is_operator(self, peer: str, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        known = self._operator_token.encode()
        if known and scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), known):
            return True
        return is_loopback(peer.removeprefix("::ffff:"))

    def _find(self, path: str, fields: dict[str, str], is_operator: bool) -> _Response:
        if path == "/metrics":
            if not is_operator:
                return _Response(HTTPStatus.UNAUTHORIZED, b"metrics are for operators\n")
            encode, content_type = choose_encoder(fields.get("accept", ""))
            return _Response(HTTPStatus.OK, encode(REGISTRY), content_type)
        if path == "/healthz":
            age = self._heartbeat.age()
            problems = [] if age < self._STUCK_AFTER else [f"the event loop has not run for {age:.0f} s"]
        elif path == "/readyz":
            problems = self._problems()
        else:
            return _Response(HTTPStatus.NOT_FOUND, b"/healthz /readyz /metrics\n")
        ready = all(isinstance(problem, Degraded) for problem in problems)
        summary = "ok" if not problems else "degraded" if ready else "unavailable"
        shown = {"status": summary} | ({"problems": problems} if is_operator else {})
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return _Response(status, json.dumps(shown).encode(), "application/json")
