"""The RPCs. Requests arrive as bytes, so that what does not decode is answered like any other bad request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias

import grpc
import structlog

from postroad.v1 import task_pb2, task_service_pb2
from services.api import batch, filters, page_tokens, queries, uuid7
from services.api.auth import Tenants
from services.api.database_threads import DatabaseThreads
from services.api.decider import Decider
from services.api.decoding import decode, question
from services.api.errors import (
    FieldViolation,
    InvalidArgument,
    StatusError,
    collect,
    draining,
    exceeds_max_allowed_packet,
    internal_error,
    not_found,
)
from services.api.metadata import Metadata, idempotency_key
from services.api.metrics import API_REQUESTS, API_SECONDS
from services.api.outbox_publisher import NewTask, OutboxEvent
from services.api.recorder import Recorder
from services.api.trace import traceparent
from services.api.validation import task_created, task_id
from services.api.views import new_task
from services.api.watch.watch_service import WatchService
from services.common.database.errors import error_text, is_too_long

__all__ = ["SERVICE", "TaskService"]

log = structlog.get_logger(__name__)

SERVICE: str = task_service_pb2.DESCRIPTOR.services_by_name["TaskService"].full_name

_TURN = 0.01
"""Seconds that a batch's items may keep the event loop at a time."""
_RESOLUTIONS = {task_service_pb2.RESOLUTION_SENT: True, task_service_pb2.RESOLUTION_NOT_SENT: False}

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class TaskService:
    """postroad.v1.TaskService."""

    def __init__(
        self,
        tenants: Tenants,
        recorder: Recorder,
        threads: DatabaseThreads,
        decider: Decider,
        *,
        watches: WatchService,
        max_body: int,
    ) -> None:
        self._tenants, self._recorder, self._threads, self._decider = tenants, recorder, threads, decider
        self._watches = watches
        self._max_body = max_body
        self._clock = uuid7.Clock()
        self._draining = False
        self._in_flight, self._idle = 0, asyncio.Event()

    def drain(self) -> None:
        """Answer what is in flight, and UNAVAILABLE to all that comes from now on."""
        self._draining = True
        self._watches.drain()

    async def answered(self, seconds: float) -> None:
        """Wait until what is in flight is answered, streams apart, at most so long; after `drain`."""
        if self._in_flight:
            self._idle.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what a grpc.aio server takes."""
        rpcs = {
            "Create": self.create,
            "BatchCreate": self.batch_create,
            "Get": self.get,
            "List": self.list,
            "Count": self.count,
            "Retry": self.retry,
            "Cancel": self.cancel,
            "Resolve": self.resolve,
        }
        methods: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(self._rpc(name, rpc)) for name, rpc in rpcs.items()
        }
        methods["Watch"] = grpc.unary_stream_rpc_method_handler(self._watch)
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def create(self, raw: bytes, metadata: Metadata) -> bytes:
        """Answer a serialized Task for a serialized CreateRequest; raise StatusError."""
        tenant = self._tenants.tenant(metadata)
        request = decode(raw, task_service_pb2.CreateRequest)
        created = self._new_task(request, tenant, idempotency_key(metadata), len(raw), metadata)
        original = await self._recorder.record(created)
        return (original or new_task(created.event)).SerializeToString()

    async def batch_create(self, raw: bytes, metadata: Metadata) -> bytes:
        """Answer a serialized BatchCreateResponse for a serialized BatchCreateRequest; raise StatusError."""
        tenant = self._tenants.tenant(metadata)
        with self._recorder.admit_batch(len(raw)):
            return await self._batch(raw, tenant, metadata)

    async def _batch(self, raw: bytes, tenant: str, metadata: Metadata) -> bytes:
        request = decode(raw, task_service_pb2.BatchCreateRequest)
        batch.check_size(len(request.requests))
        items: list[NewTask | StatusError] = []
        turn = time.monotonic() + _TURN
        for asked in request.requests:
            if time.monotonic() > turn:
                # A thousand take tens of milliseconds, those with many header fields longer.
                await asyncio.sleep(0)
                turn = time.monotonic() + _TURN
            try:
                items.append(self._new_task(asked, tenant, "", asked.ByteSize(), metadata))
            except InvalidArgument as refusal:
                items.append(refusal)
        good = [item for item in items if not isinstance(item, StatusError)]
        outcomes = iter(await self._recorder.record_batch(good) if good else ())
        return batch.response(
            item if isinstance(item, StatusError) else next(outcomes) or new_task(item.event)
            for item in items
        ).SerializeToString()

    async def get(self, raw: bytes, metadata: Metadata) -> bytes:
        """Answer a serialized Task for a serialized GetRequest; raise StatusError."""
        tenant = self._tenants.tenant(metadata)
        request = question(raw, task_service_pb2.GetRequest)
        id_ = task_id(request.id)
        task = await self._threads.run(lambda connection: queries.get(connection, tenant, id_))
        if task is None:
            raise not_found(request.id)
        return task.SerializeToString()

    async def list(self, raw: bytes, metadata: Metadata) -> bytes:
        """Answer a serialized ListResponse for a serialized ListRequest; raise StatusError."""
        tenant = self._tenants.tenant(metadata)
        request = question(raw, task_service_pb2.ListRequest)
        refused: list[FieldViolation] = []
        size = collect(refused, page_tokens.page_size, request.page_size)
        asked = collect(refused, filters.parse, request)
        if size is None or asked is None:
            raise InvalidArgument(refused)
        bound_to = asked.digest(tenant)
        after = page_tokens.decode(request.page_token, bound_to)
        tasks, last = await self._threads.run(
            lambda connection: queries.page(connection, tenant, asked, after, size)
        )
        return task_service_pb2.ListResponse(
            results=tasks, next_page_token="" if last is None else page_tokens.encode(last, bound_to)
        ).SerializeToString()

    async def count(self, raw: bytes, metadata: Metadata) -> bytes:
        """Answer a serialized CountResponse for a serialized CountRequest; raise StatusError."""
        tenant = self._tenants.tenant(metadata)
        asked = filters.parse(question(raw, task_service_pb2.CountRequest))
        counts = await self._threads.run(lambda connection: queries.count(connection, tenant, asked))
        return task_service_pb2.CountResponse(counts=counts, total=sum(counts.values())).SerializeToString()

    async def retry(self, raw: bytes, metadata: Metadata) -> bytes:
        """Answer a serialized Task for a serialized RetryRequest; raise StatusError."""
        return await self._decide(self._decider.retry, task_service_pb2.RetryRequest, raw, metadata)

    async def cancel(self, raw: bytes, metadata: Metadata) -> bytes:
        """Answer a serialized Task for a serialized CancelRequest; raise StatusError."""
        return await self._decide(self._decider.cancel, task_service_pb2.CancelRequest, raw, metadata)

    async def resolve(self, raw: bytes, metadata: Metadata) -> bytes:
        """Answer a serialized Task for a serialized ResolveRequest; raise StatusError."""
        tenant = self._tenants.tenant(metadata)
        request = question(raw, task_service_pb2.ResolveRequest)
        refused: list[FieldViolation] = []
        id_ = collect(refused, task_id, request.id)
        sent = _RESOLUTIONS.get(request.resolution)
        if sent is None:
            refused.append(FieldViolation("resolution", "is RESOLUTION_SENT or RESOLUTION_NOT_SENT"))
        if id_ is None or sent is None:
            raise InvalidArgument(refused)
        parent = traceparent(metadata.get("traceparent"), id_)
        task = await self._decider.resolve(tenant, id_, sent, parent)
        return task.SerializeToString()

    async def watch(self, raw: bytes, metadata: Metadata, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Write serialized WatchResponses for a serialized WatchRequest until it ends; raise StatusError."""
        tenant = self._tenants.tenant(metadata)
        await self._watches.watch(tenant, question(raw, task_service_pb2.WatchRequest), write)

    async def _decide(
        self,
        decide: Callable[[str, bytes, bytes], Awaitable[task_pb2.Task]],
        kind: type[task_service_pb2.RetryRequest | task_service_pb2.CancelRequest],
        raw: bytes,
        metadata: Metadata,
    ) -> bytes:
        tenant = self._tenants.tenant(metadata)
        id_ = task_id(question(raw, kind).id)
        task = await decide(tenant, id_, traceparent(metadata.get("traceparent"), id_))
        return task.SerializeToString()

    def _new_task(
        self, request: task_service_pb2.CreateRequest, tenant: str, key: str, size: int, metadata: Metadata
    ) -> NewTask:
        """Return what is to be recorded, with the next id; raise InvalidArgument."""
        event = task_created(request, tenant, key, self._max_body, time.time_ns() // 1000)
        event.task.id, event.task.created_at_us = self._clock.draw()
        event.at_us = event.task.created_at_us
        return OutboxEvent(event, traceparent(metadata.get("traceparent"), event.task.id), size)

    def _rpc(
        self, name: str, answer: Callable[[bytes, Metadata], Awaitable[bytes]]
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """Return the handler that grpc calls: errors become statuses, every answer is counted and timed."""
        answered = API_REQUESTS.labels(name, "OK")
        seconds = API_SECONDS.labels(name)

        async def handle(raw: bytes, context: Context) -> bytes:
            start = time.perf_counter()
            self._in_flight += 1
            try:
                if self._draining:
                    raise draining()
                result = await answer(raw, Metadata(context.invocation_metadata() or ()))
                answered.inc()
                return result
            except BaseException as error:
                problem = _problem(name, error)
            finally:
                seconds.observe(time.perf_counter() - start)
                self._in_flight -= 1
                if not self._in_flight:
                    self._idle.set()
            API_REQUESTS.labels(name, problem.code.name).inc()
            return await problem.abort(context)

        return handle

    async def _watch(self, raw: bytes, context: Context) -> None:
        """Answer as `_rpc` does. A stream's time means nothing; it is counted when it ends."""
        try:
            if self._draining:
                raise draining()
            await self.watch(raw, Metadata(context.invocation_metadata() or ()), context.write)
            return
        except BaseException as error:
            problem = _problem("Watch", error)
        API_REQUESTS.labels("Watch", problem.code.name).inc()
        await problem.abort(context)


def _problem(rpc: str, error: BaseException) -> StatusError:
    """Return what is answered where an RPC raised `error`; raises what ends more than the RPC."""
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
