"""The RPCs of postroad.v1.TaskService. The interceptor has authenticated and decoded each request."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Container
from typing import Any, TypeAlias

import grpc

from postroad.v1 import events_pb2, task_pb2, task_service_pb2, task_service_pb2_grpc
from services.api import batch, filters, page_tokens, queries, uuid7, views
from services.api.bounded_io import StreamWriter
from services.api.call import Call, current_call, idempotency_key
from services.api.database_threads import DatabaseThreads
from services.api.decider import Decider
from services.api.errors import InvalidArgument, StatusError, Violation, collect, not_found
from services.api.filters import Filter
from services.api.masks import mask, mask_watch_response
from services.api.outbox import NewTask, OutboxEvent
from services.api.recorder import Recorder
from services.api.scopes import denied
from services.api.token_keys import TokenKeys
from services.api.trace import client_traceparent, request_traceparent, task_traceparent
from services.api.turns import in_turns
from services.api.validation import task_created, task_id
from services.api.watch.watch_service import WatchService
from services.common.grants import CONTENT

__all__ = ["TaskServicer"]

_RESOLUTIONS = {task_service_pb2.RESOLUTION_SENT: True, task_service_pb2.RESOLUTION_NOT_SENT: False}

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class TaskServicer(task_service_pb2_grpc.TaskServiceServicer):
    """Answers each RPC for the current call. Every method raises StatusError."""

    def __init__(
        self,
        recorder: Recorder,
        threads: DatabaseThreads,
        decider: Decider,
        watch_service: WatchService,
        *,
        max_body: int,
        keys: TokenKeys,
        allowed_headers: Container[str] = (),
        partitions: int = 1,
    ) -> None:
        self._recorder, self._threads, self._decider = recorder, threads, decider
        self._watch_service = watch_service
        self._max_body, self._keys, self._allowed_headers = max_body, keys, allowed_headers
        self._ids = uuid7.IdGenerator(partitions=partitions)

    async def Create(self, request: task_service_pb2.CreateRequest, context: Context) -> task_pb2.Task:
        """Record a task."""
        call = current_call()
        event = self._validated(request, call, idempotency_key(call.metadata))
        parent = client_traceparent(call.metadata.get("traceparent"))
        new_task = _new_task(event, *self._ids.new(), parent, call.size)
        existing = await self._recorder.record(new_task)
        return existing or views.new_task(event)

    async def BatchCreate(
        self, request: task_service_pb2.BatchCreateRequest, context: Context
    ) -> task_service_pb2.BatchCreateResponse:
        """Record up to 1,000 tasks; return one result an item."""
        batch.check_size(len(request.requests))
        call = current_call()
        items: list[events_pb2.TaskCreated | StatusError] = []
        async for item in in_turns(request.requests):
            try:
                items.append(self._validated(item, call, ""))
            except InvalidArgument as error:
                items.append(error)
        events = [item for item in items if not isinstance(item, StatusError)]
        parent = client_traceparent(call.metadata.get("traceparent"))
        ids = self._ids.batch(len(events))
        new_tasks = [_new_task(event, *id_, parent, 0) for event, id_ in zip(events, ids, strict=True)]
        results = iter(await self._recorder.record_batch(new_tasks) if new_tasks else ())
        response = batch.BatchResponse()
        async for outcome in in_turns(items):
            response.add(outcome if isinstance(outcome, StatusError) else next(results) or outcome)
        return response.message

    async def Get(self, request: task_service_pb2.GetRequest, context: Context) -> task_pb2.Task:
        """Return a task with its body and its timeline."""
        id_ = task_id(request.id)
        tenant = await self._tenant_of(id_)
        task = await self._threads.read(lambda connection: queries.get(connection, tenant, id_))
        if task is None:
            raise not_found(request.id)
        return _shown(task, tenant)

    async def List(
        self, request: task_service_pb2.ListRequest, context: Context
    ) -> task_service_pb2.ListResponse:
        """Return a page of tasks, newest first."""
        call = current_call()
        tenant = call.tenant
        violations: list[Violation] = []
        size = collect(violations, page_tokens.page_size, request.page_size)
        filter_ = collect(violations, filters.parse, request)
        if size is None or filter_ is None:
            raise InvalidArgument(violations)
        _refuse_guesses(filter_)
        digest = filter_.digest(tenant)
        after = page_tokens.decode(self._keys, request.page_token, digest)
        tasks, last_id = await self._threads.read(
            lambda connection: queries.page(connection, tenant, filter_, after, size)
        )
        next_page_token = "" if last_id is None else page_tokens.encode(self._keys, last_id, digest)
        if not call.sees_content(tenant):
            tasks = [mask(task) for task in tasks]
        return task_service_pb2.ListResponse(results=tasks, next_page_token=next_page_token)

    async def Count(
        self, request: task_service_pb2.CountRequest, context: Context
    ) -> task_service_pb2.CountResponse:
        """Return the number of tasks of each status."""
        tenant, filter_ = current_call().tenant, filters.parse(request)
        _refuse_guesses(filter_)
        counts = await self._threads.read(lambda connection: queries.count(connection, tenant, filter_))
        return task_service_pb2.CountResponse(counts=counts, total=sum(counts.values()))

    async def Retry(self, request: task_service_pb2.RetryRequest, context: Context) -> task_pb2.Task:
        """Open a failed, uncertain or cancelled task again."""
        return await self._decide(self._decider.retry, request.id)

    async def Cancel(self, request: task_service_pb2.CancelRequest, context: Context) -> task_pb2.Task:
        """Cancel a task whose mail was not sent, or close an uncertain one."""
        return await self._decide(self._decider.cancel, request.id)

    async def Resolve(self, request: task_service_pb2.ResolveRequest, context: Context) -> task_pb2.Task:
        """Record whether an uncertain task's mail was sent."""
        call = current_call()
        violations: list[Violation] = []
        id_ = collect(violations, task_id, request.id)
        sent = _RESOLUTIONS.get(request.resolution)
        if sent is None:
            violations.append(Violation("resolution", "is RESOLUTION_SENT or RESOLUTION_NOT_SENT"))
        if id_ is None or sent is None:
            raise InvalidArgument(violations)
        parent = request_traceparent(call.metadata.get("traceparent"), id_)
        tenant = await self._tenant_of(id_)
        return _shown(await self._decider.resolve(tenant, id_, sent, parent), tenant)

    async def Watch(  # type: ignore[override]
        self, request: task_service_pb2.WatchRequest, context: Context
    ) -> None:
        """Write serialized WatchResponses until the stream ends (docs/adr/0025 says why serialized)."""
        call, writer = current_call(), StreamWriter(context)
        tenant = call.tenant
        if request.id and call.finds_tenants:
            tenant = await self._tenant_of(task_id(request.id))
        if call.sees_content(tenant):
            await self._watch_service.watch(tenant, request, writer.write)
            return
        _refuse_guesses(filters.parse(request))
        await self._watch_service.watch(
            tenant, request, lambda message: writer.write(mask_watch_response(message))
        )

    async def _decide(
        self, decide: Callable[[str, bytes, bytes], Awaitable[task_pb2.Task]], id_text: str
    ) -> task_pb2.Task:
        id_ = task_id(id_text)
        tenant = await self._tenant_of(id_)
        parent = request_traceparent(current_call().metadata.get("traceparent"), id_)
        return _shown(await decide(tenant, id_, parent), tenant)

    async def _tenant_of(self, id_: bytes) -> str:
        """Return the tenant of the current call: for an operator who names none, that of the task."""
        call = current_call()
        if not call.finds_tenants:
            return call.tenant
        found = await self._threads.run(lambda connection: queries.tenant_of(connection, id_))
        return call.tenant if found is None else found

    def _validated(
        self, request: task_service_pb2.CreateRequest, call: Call, key_in_metadata: str
    ) -> events_pb2.TaskCreated:
        """Return the event of the requested task, without its id and its times; raise InvalidArgument."""
        return task_created(
            request,
            call.tenant,
            key_in_metadata,
            self._max_body,
            time.time_ns() // 1000,
            allowed_headers=self._allowed_headers,
        )


def _new_task(event: events_pb2.TaskCreated, id_: bytes, us: int, parent: bytes | None, size: int) -> NewTask:
    """Give the event its id and its time; return it with its trace context."""
    task = event.task
    task.id = id_
    task.created_at_us = event.at_us = us
    return OutboxEvent(event, parent or task_traceparent(id_), size)


def _shown(task: task_pb2.Task, tenant: str) -> task_pb2.Task:
    """Return a task of this tenant as the current call may see it."""
    return task if current_call().sees_content(tenant) else mask(task)


def _refuse_guesses(filter_: Filter) -> None:
    """Refuse a filter by an address that the current call may not see: the answer would confirm a guess."""
    call = current_call()
    if filter_.email is not None and not call.sees_content(call.tenant):
        raise denied(CONTENT, "a filter by the address of another tenant's mails")
