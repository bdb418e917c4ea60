"""The HTTP server of a service: /healthz (alive), /readyz (ready for work) and /metrics.

It has a thread of its own, so that it answers even while the event loop is busy.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

__all__ = ["Degraded", "HealthServer", "Heartbeat"]


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


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # HTTPServer's own method asks DNS for this host's full name, which can take many seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _QuietRequestHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class HealthServer:
    """Serves the three paths until the context ends.

    `listen` is host:port (port 0: any free one). `problems` returns why the service is not ready, and as
    `Degraded` what is wrong although it is ready. Raises OSError if the port is taken.
    """

    # Longer than a garbage collection or a busy second, shorter than an orchestrator waits (seconds).
    _STUCK_AFTER = 15.0

    def __init__(self, listen: str, heartbeat: Heartbeat, problems: Callable[[], list[str]]) -> None:
        host, _, port = listen.rpartition(":")
        self._heartbeat, self._problems = heartbeat, problems
        self._metrics = make_wsgi_app()
        self._server = make_server(
            host.strip("[]"), int(port), self._answer, _ThreadingServer, _QuietRequestHandler
        )
        self.address = f"{host}:{self._server.server_port}"

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return self._metrics(environ, start_response)  # type: ignore[no-any-return]
        if path == "/healthz":
            age = self._heartbeat.age()
            problems = [] if age < self._STUCK_AFTER else [f"the event loop has not run for {age:.0f} s"]
        elif path == "/readyz":
            problems = self._problems()
        else:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/healthz /readyz /metrics\n"]
        ready = all(isinstance(problem, Degraded) for problem in problems)
        summary = "ok" if not problems else "degraded" if ready else "unavailable"
        body = json.dumps({"status": summary, "problems": problems}).encode()
        status = "200 OK" if ready else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="health", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
