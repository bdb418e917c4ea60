"""grpc.health.v1.Health. All names have the same status, so the api reads no request.

Whoever reaches the port may ask without a token. The request is not read because its size cannot be limited
without limiting that of every RPC (docs/adr/0031).
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from services.api.bounded_io import Context, StreamWriter
from services.api.errors import StatusError, overloaded

__all__ = ["MAX_CALLS", "SERVICE_NAME", "HealthServicer"]

SERVICE_NAME: str = health.SERVICE_NAME
MAX_CALLS = 1000
"""Checks that may be open, and Watches. One that nobody reads stays open until its connection ends."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class _OpenCalls:
    """Counts the open calls of one method."""

    def __init__(self) -> None:
        self.count = 0

    async def admit(self, context: Context) -> None:
        """Count a call until its task ends, which is after its last write; refuse one too many."""
        if self.count >= MAX_CALLS:
            await overloaded().abort(context)
        task = asyncio.current_task()
        assert task is not None
        self.count += 1
        task.add_done_callback(self._ended)

    def _ended(self, _: asyncio.Task[None]) -> None:
        self.count -= 1


class HealthServicer:
    """Tells clients whether the api serves. Belongs to one event loop. `set` and `drain` wait for nobody."""

    def __init__(self) -> None:
        self._is_serving = self._draining = False
        self._changed = asyncio.Event()
        self._checks, self._watches = _OpenCalls(), _OpenCalls()

    def set(self, is_serving: bool) -> None:
        """Tell this from now on, unless the api drains."""
        if is_serving != self._is_serving and not self._draining:
            self._is_serving = is_serving
            # Each change has an event of its own, which wakes whoever waits for it.
            self._changed.set()
            self._changed = asyncio.Event()

    def drain(self) -> None:
        """Tell from now on that the api does not serve."""
        self.set(False)
        self._draining = True

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler of the service. Its methods get no request, as those of streams do."""
        handlers: dict[str, Any] = {
            "Check": grpc.stream_unary_rpc_method_handler(self._check),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    async def _check(self, _: object, context: Context) -> bytes:
        await self._checks.admit(context)
        return self._response()

    async def _watch(self, _: object, context: Context) -> None:
        await self._watches.admit(context)
        writer = StreamWriter(context)
        while True:
            changed = self._changed
            try:
                await writer.write_in_time(self._response())
            except StatusError as error:
                await error.abort(context)
            await changed.wait()

    def _response(self) -> bytes:
        status = _SERVING if self._is_serving else _NOT_SERVING
        serialized: bytes = health_pb2.HealthCheckResponse(status=status).SerializeToString()
        return serialized
