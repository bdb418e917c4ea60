"""Records new tasks: the row, the body and the outbox row in one transaction.

Concurrent Creates share a transaction. Each batch has a transaction and a thread of its own, so that single
Creates do not wait behind it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias, TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from postroad.v1 import task_pb2
from services.api import outbox
from services.api.admission import AdmissionControl
from services.api.errors import DATABASE_TIMEOUT, StatusError, database_unavailable, idempotency_conflict
from services.api.new_task_row import row_of_new_task
from services.api.outbox import NewTask
from services.api.queries import tasks_of
from services.api.time_limit import TimeLimit
from services.api.uuid7 import text
from services.common import taskstore
from services.common.batching import Batcher
from services.common.database.errors import error_text, is_transient
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.fold import TaskRow
from services.common.timeline import timeline_row

__all__ = ["RecordResult", "Recorder"]

RecordResult: TypeAlias = task_pb2.Task | StatusError | None
"""None for a new task, the existing task of the same idempotency key and request, or the conflict."""

log = structlog.get_logger(__name__)

R = TypeVar("R")

_MAX_SHARED = 500
_MAX_SHARED_BYTES = 4 << 20
_BATCH_TIMEOUT = 20.0
"""Seconds. A batch may write megabytes to each of several disks."""


class Recorder:
    """Records tasks through two Batchers. Belongs to one event loop.

    `on_commit` gets the new tasks of each transaction that are due at once, on a worker thread. At most
    `max_count` Creates and `max_bytes` of them wait, and as many in batches. Further ones are refused.
    """

    def __init__(
        self,
        engine: Engine,
        on_commit: Callable[[Sequence[NewTask]], None],
        max_count: int,
        max_bytes: int,
    ) -> None:
        self._engine, self._on_commit = engine, on_commit
        self._time, self._batch_time = TimeLimit(DATABASE_TIMEOUT), TimeLimit(_BATCH_TIMEOUT)
        # Separate limits: a few batches hold thousands of Creates, and would have single ones refused.
        self._admission = AdmissionControl(max_count, max_bytes)
        self._batch_admission = AdmissionControl(max_count, max_bytes)
        self._singles: Batcher[NewTask, RecordResult] = Batcher(
            self._record,
            _MAX_SHARED,
            shared=is_transient,
            weigh=lambda new_task: new_task.size,
            weight_limit=_MAX_SHARED_BYTES,
            name="recorder",
        )
        self._batches: Batcher[Sequence[NewTask], list[RecordResult]] = Batcher(
            lambda batches: [self._record(batch) for batch in batches], 1, name="batches"
        )

    async def record(self, new_task: NewTask) -> task_pb2.Task | None:
        """Return None once the task is recorded, or the existing task of its idempotency key.

        Raises StatusError: ALREADY_EXISTS if the key belongs to another request, RESOURCE_EXHAUSTED if too
        many Creates wait. UNAVAILABLE means that the database does not answer within 4.5 s. The task may then
        be recorded or not. A client that sent an idempotency key can safely repeat its call.
        """
        with self._admission.admit(1, new_task.size):
            result = await _within(self._time, self._singles.one(new_task))
        if isinstance(result, StatusError):
            raise result
        return result

    def admit_batch(self, size: int) -> AbstractContextManager[None]:
        """Count a batch's bytes as waiting, inside the `with` block, which begins before it is decoded.

        Raises StatusError RESOURCE_EXHAUSTED at a limit.
        """
        return self._batch_admission.admit(0, size)

    async def record_batch(self, batch: Sequence[NewTask]) -> list[RecordResult]:
        """Record these tasks in one transaction; return each one's result, in their order.

        The caller holds `admit_batch`. Raises StatusError as `record` does, except for conflicts, which are
        results. After UNAVAILABLE all of the batch may be recorded or nothing of it.
        """
        with self._batch_admission.admit_count(len(batch)):
            return await _within(self._batch_time, self._batches.one(batch))

    async def close(self) -> None:
        """Refuse new tasks; return once all waiting ones are recorded or have failed."""
        await self._singles.close()
        await self._batches.close()

    def _record(self, batch: Sequence[NewTask]) -> list[RecordResult]:
        # `transaction` repeats this with the same ids, so a connection lost during the commit does no harm.
        results, recorded = transaction(self._engine, lambda connection: _write(connection, batch))
        due = [new_task for new_task in recorded if not new_task.event.send_at_us]
        if due:
            self._on_commit(due)
        return results


async def _within(limit: TimeLimit, call: Awaitable[R]) -> R:
    """Return the call's result; raise UNAVAILABLE where the database takes longer or is away."""
    try:
        with limit.block():
            return await call
    except TimeoutError:
        raise database_unavailable() from None
    except SQLAlchemyError as error:
        if not is_transient(error):
            raise
        log.warning("not recorded", error=error_text(error))
        raise database_unavailable() from None


def _write(connection: Connection, batch: Sequence[NewTask]) -> tuple[list[RecordResult], Sequence[NewTask]]:
    """Write a batch; return each task's result, and the tasks that are new."""
    rows = [row_of_new_task(new_task.event) for new_task in batch]
    taskstore.upsert(connection, rows)
    results = _existing(connection, rows)
    recorded = batch
    if results:
        recorded = [new_task for new_task, row in zip(batch, rows, strict=True) if row.id not in results]
    events = [new_task.event for new_task in recorded]
    taskstore.insert_bodies(connection, [taskstore.body_of(event.task) for event in events])
    scheduled = [event for event in events if event.send_at_us]
    due = [event for event in events if not event.send_at_us] if scheduled else events
    outbox.put(connection, [outbox.created(event.task.id) for event in due])
    outbox.insert_scheduled(
        connection, [(outbox.row_of(event), from_micros(event.send_at_us)) for event in scheduled]
    )
    # The status service adds the timeline entry of a due event a moment later.
    taskstore.insert_events(connection, map(timeline_row, scheduled))
    return [results.get(row.id) for row in rows], recorded


def _existing(connection: Connection, rows: Sequence[TaskRow]) -> dict[bytes, task_pb2.Task | StatusError]:
    """Return the results of those tasks, by id, whose idempotency key another task has.

    The upsert has skipped them.
    """
    keys = {
        row.id: (str(row.tenant), row.idempotency_key.decode())
        for row in rows
        if row.idempotency_key is not None
    }
    if not keys:
        return {}
    owners = taskstore.owners_of_keys(connection, sorted(set(keys.values())))
    existing = {id_: owners[key] for id_, key in keys.items() if owners[key][0] != id_}
    originals = tasks_of(connection, sorted({original for original, _ in existing.values()}))
    hashes = {row.id: row.request_hash for row in rows}
    return {
        id_: originals[original] if request_hash == hashes[id_] else idempotency_conflict(text(original))
        for id_, (original, request_hash) in existing.items()
    }
