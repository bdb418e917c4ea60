"""Recording: task, body and outbox row in one transaction, which concurrent Creates share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from postroad.v1 import task_pb2
from services.api import outbox
from services.api.errors import PATIENCE, Problem, conflict, overloaded, unavailable
from services.api.queries import tasks_of
from services.api.relay import Creation
from services.api.uuid7 import text
from services.common import taskstore
from services.common.batching import Batcher
from services.common.database import said, transaction, transient
from services.common.fold import delta

__all__ = ["Recorder"]

log = structlog.get_logger(__name__)

_LIMIT = 500
_LIMIT_BYTES = 4 << 20


class Recorder:
    """Records tasks through one Batcher.

    `committed` is told, on a worker thread, what each transaction has newly recorded. At most `most`
    Creates and `most_bytes` of theirs wait; more are refused at once.
    """

    def __init__(
        self,
        engine: Engine,
        committed: Callable[[Sequence[Creation]], None],
        most: int,
        most_bytes: int,
    ) -> None:
        self._engine, self._committed = engine, committed
        self._most, self._most_bytes, self._bytes = most, most_bytes, 0
        self._batcher: Batcher[Creation, task_pb2.Task | None] = Batcher(
            self._record,
            _LIMIT,
            shared=transient,
            weigh=lambda recording: recording.size,
            weight_limit=_LIMIT_BYTES,
            name="recorder",
        )

    async def record(self, recording: Creation) -> task_pb2.Task | None:
        """Return None once the task is recorded, or the task that its idempotency key stands for already.

        Raises Problem: ALREADY_EXISTS where the key stands for another request, RESOURCE_EXHAUSTED
        where too many wait, UNAVAILABLE where the database does not answer; whether the task was
        recorded is then unknown, and a client with an idempotency key may just ask again.
        """
        if self._batcher.pending >= self._most or self._bytes > self._most_bytes:
            raise overloaded()
        self._bytes += recording.size
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._batcher(recording)
        except TimeoutError:
            raise unavailable() from None
        except SQLAlchemyError as error:
            if not transient(error):
                raise
            log.warning("not recorded", error=said(error))
            raise unavailable() from None
        finally:
            self._bytes -= recording.size

    async def close(self) -> None:
        """Refuse what comes from now on; return once all that waited is settled."""
        await self._batcher.close()

    def _record(self, batch: Sequence[Creation]) -> list[task_pb2.Task | Problem | None]:
        # The same ids each time that it is done again, so a connection lost while it commits is no harm.
        results, recorded = transaction(self._engine, lambda connection: _write(connection, batch))
        if recorded:
            self._committed(recorded)
        return results


def _write(
    connection: Connection, batch: Sequence[Creation]
) -> tuple[list[task_pb2.Task | Problem | None], list[Creation]]:
    tasks = [recording.event.task for recording in batch]
    taskstore.upsert(connection, [delta(recording.event) for recording in batch])
    keys = [(task.tenant, task.idempotency_key) for task in tasks if task.idempotency_key]
    owners = taskstore.owners_of_keys(connection, sorted(set(keys)))
    # A task whose key is another's was not stored by the upsert; what its key stands for is answered.
    others = {
        task.id: owner
        for task in tasks
        if task.idempotency_key and (owner := owners[task.tenant, task.idempotency_key])[0] != task.id
    }
    recorded = [recording for recording in batch if recording.event.task.id not in others]
    taskstore.insert_bodies(connection, [taskstore.body_of(recording.event.task) for recording in recorded])
    outbox.put(connection, [outbox.created(recording.event.task.id) for recording in recorded])
    originals = tasks_of(connection, sorted({id_ for id_, _ in others.values()}))
    results: list[task_pb2.Task | Problem | None] = []
    for task in tasks:
        if task.id not in others:
            results.append(None)
            continue
        original, request_hash = others[task.id]
        same = request_hash == task.request_hash
        results.append(originals[original] if same else conflict(text(original)))
    return results, recorded
