"""Recording: task, body and outbox row in one transaction, which concurrent Creates share.

A batch has a transaction of its own, and a thread of its own: single Creates do not wait behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias, TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from postroad.v1 import task_pb2
from services.api import outbox
from services.api.errors import PATIENCE, Problem, conflict, unavailable
from services.api.queries import tasks_of
from services.api.relay import Creation
from services.api.room import Room
from services.api.uuid7 import text
from services.common import taskstore
from services.common.batching import Batcher
from services.common.database.errors import error_text, is_transient
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.fold import delta
from services.common.timeline import timeline_entry

__all__ = ["Recorded", "Recorder"]

Recorded: TypeAlias = task_pb2.Task | Problem | None
"""None for a task that was recorded, the task that its idempotency key stands for, or the conflict."""

log = structlog.get_logger(__name__)

R = TypeVar("R")

_LIMIT = 500
_LIMIT_BYTES = 4 << 20
_BATCH_PATIENCE = 20.0
"""Seconds: a batch may bring megabytes to each of several disks."""


class Recorder:
    """Records tasks through two Batchers.

    `committed` is told, on a worker thread, what of each transaction is to be published at once. At most
    `most` Creates and `most_bytes` of theirs wait, and as many in batches; more are refused at once.
    """

    def __init__(
        self,
        engine: Engine,
        committed: Callable[[Sequence[Creation]], None],
        most: int,
        most_bytes: int,
    ) -> None:
        self._engine, self._committed = engine, committed
        # Apart: a few batches have thousands of Creates, and would have single ones refused.
        self._room, self._batch_room = Room(most, most_bytes), Room(most, most_bytes)
        self._singles: Batcher[Creation, Recorded] = Batcher(
            self._record,
            _LIMIT,
            shared=is_transient,
            weigh=lambda creation: creation.size,
            weight_limit=_LIMIT_BYTES,
            name="recorder",
        )
        self._batches: Batcher[Sequence[Creation], list[Recorded]] = Batcher(
            lambda batches: [self._record(batch) for batch in batches], 1, name="batches"
        )

    async def record(self, creation: Creation) -> task_pb2.Task | None:
        """Return None once the task is recorded, or the task that its idempotency key stands for already.

        Raises Problem: ALREADY_EXISTS where the key stands for another request, RESOURCE_EXHAUSTED
        where too many wait, UNAVAILABLE where the database does not answer; whether the task was
        recorded is then unknown, and a client with an idempotency key may just ask again.
        """
        with self._room.hold(1, creation.size):
            result = await _answer(self._singles(creation), PATIENCE)
        if isinstance(result, Problem):
            raise result
        return result

    def batch(self, size: int) -> AbstractContextManager[None]:
        """Hold room for the bytes of a batch until it is answered; to be entered before it is decoded.

        Raises Problem: RESOURCE_EXHAUSTED where too much waits.
        """
        return self._batch_room.hold(0, size)

    async def record_batch(self, batch: Sequence[Creation]) -> list[Recorded]:
        """Return what became of each, in their order, once all of them are recorded in one transaction.

        To be called within `batch`. Raises Problem as `record` does, but for the conflicts; then none was
        recorded, or it is unknown.
        """
        with self._batch_room.add(len(batch)):
            return await _answer(self._batches(batch), _BATCH_PATIENCE)

    async def close(self) -> None:
        """Refuse what comes from now on; return once all that waited is settled."""
        await self._singles.close()
        await self._batches.close()

    def _record(self, batch: Sequence[Creation]) -> list[Recorded]:
        # The same ids each time that it is done again, so a connection lost while it commits is no harm.
        results, recorded = transaction(self._engine, lambda connection: _write(connection, batch))
        now = [creation for creation in recorded if not creation.event.send_at_us]
        if now:
            self._committed(now)
        return results


async def _answer(call: Awaitable[R], patience: float) -> R:
    """Return what a call answers; raise UNAVAILABLE where the database does not in `patience` seconds."""
    try:
        async with asyncio.timeout(patience):
            return await call
    except TimeoutError:
        raise unavailable() from None
    except SQLAlchemyError as error:
        if not is_transient(error):
            raise
        log.warning("not recorded", error=error_text(error))
        raise unavailable() from None


def _write(connection: Connection, batch: Sequence[Creation]) -> tuple[list[Recorded], list[Creation]]:
    tasks = [creation.event.task for creation in batch]
    taskstore.upsert(connection, [delta(creation.event) for creation in batch])
    keys = [(task.tenant, task.idempotency_key) for task in tasks if task.idempotency_key]
    owners = taskstore.owners_of_keys(connection, sorted(set(keys)))
    # A task whose key is another's was not stored by the upsert; what its key stands for is answered.
    others = {
        task.id: owner
        for task in tasks
        if task.idempotency_key and (owner := owners[task.tenant, task.idempotency_key])[0] != task.id
    }
    recorded = [creation for creation in batch if creation.event.task.id not in others]
    taskstore.insert_bodies(connection, [taskstore.body_of(creation.event.task) for creation in recorded])
    scheduled = [creation.event for creation in recorded if creation.event.send_at_us]
    outbox.put(
        connection, [outbox.item_of(creation.event) for creation in recorded if not creation.event.send_at_us]
    )
    outbox.schedule(
        connection, [(outbox.item_of(event), from_micros(event.send_at_us)) for event in scheduled]
    )
    # Of the others the status service tells a moment later.
    taskstore.insert_events(connection, map(timeline_entry, scheduled))
    originals = tasks_of(connection, sorted({id_ for id_, _ in others.values()}))
    results: list[Recorded] = []
    for task in tasks:
        if task.id not in others:
            results.append(None)
            continue
        original, request_hash = others[task.id]
        same = request_hash == task.request_hash
        results.append(originals[original] if same else conflict(text(original)))
    return results, recorded
