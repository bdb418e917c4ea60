"""Runs around every RPC of the task service: authenticates, reads, admits, decodes, counts, reports errors.

gRPC reads the request of a unary RPC before it calls a handler. The interceptor therefore registers each RPC
as one that takes a stream, and reads nothing of a call that its headers do not authenticate (docs/adr/0031).

gRPC answers UNKNOWN without details where it cannot decode a request itself. The interceptor therefore takes
requests as bytes, and refuses such a request like any other invalid one (docs/adr/0025).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from postroad.v1 import task_service_pb2
from services.api.auth import Authenticator
from services.api.bounded_io import READ_TIMEOUT, Context, StreamWriter, read
from services.api.call import Call, Metadata, set_call
from services.api.errors import (
    StatusError,
    draining,
    exceeds_max_allowed_packet,
    internal_error,
    invalid_field,
    no_request,
)
from services.api.health import SERVICE_NAME as HEALTH
from services.api.metrics import API_REQUESTS, API_SECONDS
from services.api.open_streams import OpenStreams
from services.api.scopes import tenant_of
from services.api.time_limit import TimeLimit
from services.common.database.errors import error_text, is_too_long
from services.common.grants import Grant

__all__ = ["MAX_BATCH", "MAX_CREATE", "MAX_QUERY", "SERVICE", "RequestInterceptor"]

log = structlog.get_logger(__name__)

_DESCRIPTOR = task_service_pb2.DESCRIPTOR.services_by_name["TaskService"]
SERVICE: str = _DESCRIPTOR.full_name
"""The full name of the task service."""
MAX_QUERY = 256 << 10
"""Bytes of a request without a mail: four times the longest resume token."""
MAX_CREATE = 4 << 20
"""Bytes of a request with one mail: twice the largest POSTROAD_MAX_BODY."""
MAX_BATCH = 32 << 20
"""Bytes of a request with many mails: a batch of 1,000 tasks may have 32 KiB a task."""

_ADMITTED = nullcontext()
Admit: TypeAlias = Callable[[int], AbstractContextManager[None]]
"""Admits a request of so many bytes while it is decoded and answered; raises StatusError to refuse it."""
RpcHandler: TypeAlias = Any
"""A grpc.RpcMethodHandler. types-grpcio knows only those of synchronous servers."""


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of all services but health, which needs no token. Belongs to one event loop.

    `admit_batch` admits the requests of BatchCreate before they are decoded.
    """

    def __init__(self, authenticator: Authenticator, streams: OpenStreams, admit_batch: Admit) -> None:
        self._authenticator, self._streams = authenticator, streams
        # Create is admitted after decoding, together with other Creates. A batch's size is limited by gRPC.
        self._admit: Mapping[str, Admit] = {"Create": _admit_create, "BatchCreate": admit_batch}
        self._handlers: dict[str, RpcHandler] = {}
        self._reading = TimeLimit(READ_TIMEOUT)
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
        method = handler_call_details.method.lstrip("/")
        service, _, rpc = method.rpartition("/")
        if service == HEALTH:
            return await continuation(handler_call_details)
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[method] = self.wrap(rpc, handler) if service == SERVICE else self._guard(handler)
        return self._handlers[method]

    def wrap(self, rpc: str, handler: RpcHandler) -> RpcHandler:
        """Return a handler that reads bytes and calls `handler`, the one of this RPC."""
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._wrap_stream(rpc, handler))
        return grpc.stream_unary_rpc_method_handler(self._wrap_unary(rpc, handler))

    def _wrap_unary(self, rpc: str, handler: RpcHandler) -> Callable[[object, Context], Awaitable[bytes]]:
        succeeded = API_REQUESTS.labels(rpc, "OK")
        seconds = API_SECONDS.labels(rpc)
        answer, serialize = handler.unary_unary, handler.response_serializer
        admit = self._admit.get(rpc, _admit_query)

        async def respond(context: Context) -> bytes:
            call, raw = await self._read(rpc, admit, context)
            start = time.perf_counter()
            self._in_flight += 1
            try:
                if self._draining:
                    raise draining()
                with admit(call.size):
                    request = _decode(rpc, handler.request_deserializer, raw)
                    set_call(call)
                    response: bytes = serialize(await answer(request, context))
                succeeded.inc()
                return response
            finally:
                seconds.observe(time.perf_counter() - start)
                self._in_flight -= 1
                if not self._in_flight:
                    self._idle.set()

        async def handle(_: object, context: Context) -> bytes:
            try:
                return await respond(context)
            except BaseException as error:
                status = _status_of(rpc, error)
            API_REQUESTS.labels(rpc, status.code.name).inc()
            return await status.abort(context)

        return handle

    def _wrap_stream(self, rpc: str, handler: RpcHandler) -> Callable[[object, Context], Awaitable[None]]:
        """Wrap a stream, which writes serialized messages. It counts when it ends, and its time does not."""
        admit = self._admit.get(rpc, _admit_query)

        async def handle(_: object, context: Context) -> None:
            try:
                call, raw = await self._read(rpc, admit, context)
                if self._draining:
                    raise draining()
                with admit(call.size):
                    request = _decode(rpc, handler.request_deserializer, raw)
                    set_call(call)
                    async with self._streams.hold(call.grant):
                        await handler.unary_stream(request, context)
                return
            except BaseException as error:
                status = _status_of(rpc, error)
            API_REQUESTS.labels(rpc, status.code.name).inc()
            await status.abort(context)

        return handle

    def _guard(self, handler: RpcHandler) -> RpcHandler:
        """Return a handler that demands a token for `handler`, which takes a stream and answers with one."""

        async def requests(context: Context) -> AsyncIterator[Any]:
            while (raw := await read(context, self._reading)) is not None:
                yield handler.request_deserializer(raw)

        async def handle(_: object, context: Context) -> None:
            writer = StreamWriter(context)
            try:
                metadata = Metadata(context.invocation_metadata() or ())
                async with self._streams.hold(self._authenticator.authenticate(metadata, context)):
                    async for response in handler.stream_stream(requests(context), context):
                        await writer.write_in_time(handler.response_serializer(response))
            except StatusError as error:
                await error.abort(context)

        return grpc.stream_stream_rpc_method_handler(handle)

    async def _read(self, rpc: str, admit: Admit, context: Context) -> tuple[Call, bytes]:
        """Return an authenticated call and its request; raise StatusError, before it reads if possible."""
        if self._draining:
            raise draining()
        metadata = Metadata(context.invocation_metadata() or ())
        self._allowed(rpc, metadata, context)
        with admit(0):
            # A replica that takes no more batches now does not read one.
            pass
        if (raw := await read(context, self._reading)) is None:
            raise no_request()
        # The client had a minute for its request, in which its token may have been revoked.
        grant, tenant = self._allowed(rpc, metadata, context)
        return Call(tenant, metadata, len(raw), grant), raw

    def _allowed(self, rpc: str, metadata: Metadata, context: Context) -> tuple[Grant, str]:
        """Return what a call may do, and whose tasks it is for; raise StatusError if it is not allowed."""
        grant = self._authenticator.authenticate(metadata, context)
        return grant, tenant_of(rpc, grant, metadata)


def _decode(rpc: str, deserialize: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return deserialize(raw)
    except DecodeError:
        name = _DESCRIPTOR.methods_by_name[rpc].input_type.full_name
        raise invalid_field("request", f"the bytes are not a valid {name}") from None


def _admit_create(size: int) -> AbstractContextManager[None]:
    return _admit_up_to(MAX_CREATE, size)


def _admit_query(size: int) -> AbstractContextManager[None]:
    return _admit_up_to(MAX_QUERY, size)


def _admit_up_to(limit: int, size: int) -> AbstractContextManager[None]:
    if size > limit:
        raise invalid_field("request", f"has {limit} bytes at most, not {size}")
    return _ADMITTED


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
