"""Runs around every RPC of the task service: authenticates, admits, decodes, counts, and reports errors.

gRPC answers UNKNOWN without details where it cannot decode a request itself. The interceptor therefore takes
requests as bytes, and refuses such a request like any other invalid one (docs/adr/0025).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from postroad.v1 import task_service_pb2
from services.api.auth import Tenants
from services.api.call import Call, Metadata, set_call
from services.api.errors import (
    StatusError,
    draining,
    exceeds_max_allowed_packet,
    internal_error,
    invalid_field,
)
from services.api.metrics import API_REQUESTS, API_SECONDS
from services.common.database.errors import error_text, is_too_long

__all__ = ["MAX_QUERY", "SERVICE", "RequestInterceptor"]

log = structlog.get_logger(__name__)

_DESCRIPTOR = task_service_pb2.DESCRIPTOR.services_by_name["TaskService"]
SERVICE: str = _DESCRIPTOR.full_name
"""The full name of the task service."""
MAX_QUERY = 256 << 10
"""Bytes of a request without a mail: four times the longest resume token."""

Admit: TypeAlias = Callable[[int], AbstractContextManager[None]]
"""Admits a request of so many bytes while it is decoded and answered; raises StatusError to refuse it."""
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
RpcHandler: TypeAlias = Any
"""A grpc.RpcMethodHandler. types-grpcio knows only those of synchronous servers."""


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of the task service. Leaves other services alone. Belongs to one event loop.

    `admit_batch` admits the requests of BatchCreate before they are decoded.
    """

    def __init__(self, tenants: Tenants, admit_batch: Admit) -> None:
        self._tenants = tenants
        # Create is admitted after decoding, together with other Creates. Its size is limited by gRPC.
        self._admit: Mapping[str, Admit] = {"Create": lambda _: nullcontext(), "BatchCreate": admit_batch}
        self._handlers: dict[str, RpcHandler] = {}
        self._draining = False
        self._in_flight, self._idle = 0, asyncio.Event()

    def drain(self) -> None:
        """Answer UNAVAILABLE to every further call. Calls in flight continue."""
        self._draining = True

    async def answered(self, seconds: float) -> None:
        """Wait until all calls in flight, except streams, are answered; at most `seconds`."""
        if self._in_flight:
            self._idle.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[RpcHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> RpcHandler | None:
        """Return the wrapped handler of a call; None where the service has no such RPC."""
        service, _, rpc = handler_call_details.method.lstrip("/").rpartition("/")
        if service != SERVICE:
            return await continuation(handler_call_details)
        if rpc not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[rpc] = self.wrap(rpc, handler)
        return self._handlers[rpc]

    def wrap(self, rpc: str, handler: RpcHandler) -> RpcHandler:
        """Return a handler that takes bytes and calls `handler`, the one of this RPC."""
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._wrap_stream(rpc, handler))
        return grpc.unary_unary_rpc_method_handler(self._wrap_unary(rpc, handler))

    def _wrap_unary(self, rpc: str, handler: RpcHandler) -> Callable[[bytes, Context], Awaitable[bytes]]:
        succeeded = API_REQUESTS.labels(rpc, "OK")
        seconds = API_SECONDS.labels(rpc)
        answer, serialize = handler.unary_unary, handler.response_serializer

        async def handle(raw: bytes, context: Context) -> bytes:
            start = time.perf_counter()
            self._in_flight += 1
            try:
                with self._begin(rpc, raw, context, handler.request_deserializer) as request:
                    response: bytes = serialize(await answer(request, context))
                succeeded.inc()
                return response
            except BaseException as error:
                status = _status_of(rpc, error)
            finally:
                seconds.observe(time.perf_counter() - start)
                self._in_flight -= 1
                if not self._in_flight:
                    self._idle.set()
            API_REQUESTS.labels(rpc, status.code.name).inc()
            return await status.abort(context)

        return handle

    def _wrap_stream(self, rpc: str, handler: RpcHandler) -> Callable[[bytes, Context], Awaitable[None]]:
        """Wrap a stream, which writes serialized messages. It counts when it ends, and its time does not."""

        async def handle(raw: bytes, context: Context) -> None:
            try:
                with self._begin(rpc, raw, context, handler.request_deserializer) as request:
                    await handler.unary_stream(request, context)
                return
            except BaseException as error:
                status = _status_of(rpc, error)
            API_REQUESTS.labels(rpc, status.code.name).inc()
            await status.abort(context)

        return handle

    @contextmanager
    def _begin(self, rpc: str, raw: bytes, context: Context, decode: Callable[[bytes], Any]) -> Iterator[Any]:
        """Make this the current call, admitted inside the `with` block, and yield its request."""
        if self._draining:
            raise draining()
        metadata = Metadata(context.invocation_metadata() or ())
        call = Call(self._tenants.tenant(metadata), metadata, len(raw))
        with self._admit.get(rpc, _admit_query)(call.size):
            try:
                request = decode(raw)
            except DecodeError:
                name = _DESCRIPTOR.methods_by_name[rpc].input_type.full_name
                raise invalid_field("request", f"the bytes are not a valid {name}") from None
            set_call(call)
            yield request


def _admit_query(size: int) -> AbstractContextManager[None]:
    if size > MAX_QUERY:
        raise invalid_field("request", f"has {MAX_QUERY} bytes at most, not {size}")
    return nullcontext()


def _status_of(rpc: str, error: BaseException) -> StatusError:
    """Return the error that a client gets for `error`; raise errors that end more than the RPC."""
    if isinstance(error, StatusError):
        return error
    if isinstance(error, asyncio.CancelledError):
        API_REQUESTS.labels(rpc, "CANCELLED").inc()
    if not isinstance(error, Exception):
        raise error
    if is_too_long(error):
        log.error("not recorded", rpc=rpc, error=error_text(error))
        return exceeds_max_allowed_packet()
    log.error("unexpected", rpc=rpc, exc_info=error)
    return internal_error()
