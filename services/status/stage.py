"""The status stage: it folds all events of all topics into the tables that List and Get read."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from sqlalchemy import Connection, Engine

from postroad.v1 import events_pb2 as pb
from services.common.batching import Batcher
from services.common.database.errors import error_text, is_database_fault, is_transient
from services.common.database.transactions import retry_until_available, transaction
from services.common.deliveries.mx_failures import store_failures
from services.common.events import Event
from services.common.merge_events import merge_events
from services.common.stage.types import Dead, Done, Outcome, Record, Stage
from services.common.stages import STAGES
from services.common.taskstore import insert_timeline

__all__ = ["StatusHandler", "stage"]

_DONE = Done()

log = structlog.get_logger(__name__)


class StatusHandler:
    """Folds batches of records, each batch in one transaction.

    While the database is away a batch waits, and `problems` says why. If the database rejects a record's
    data, that record becomes Dead, and the others of the batch are stored. Any other error (a missing
    table) is raised, and the runtime repeats the batch.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._batches: Batcher[Sequence[Event], None] = Batcher(self._store_each, 1, name="fold")
        self._halves: Batcher[Event, None] = Batcher(self._store, shared=is_database_fault, name="halves")
        self._problem: str | None = None

    async def handle_batch(self, records: Sequence[Record]) -> Sequence[Outcome]:
        """Return Done for every record whose event is stored now or was stored before."""
        events = [record.event for record in records]
        try:
            outcomes = await self._fold(events)
        except Exception as error:
            if not is_transient(error):
                raise
            self._noticed(error)
            # Only after a failure: the retry policy costs as much as the fold of a small batch.
            outcomes = await retry_until_available(self._noticed)(self._fold, events)
        self._problem = None
        return outcomes

    def problems(self) -> list[str]:
        """Return what the present batch waits for. Safe on any thread."""
        problem = self._problem
        return [problem] if problem else []

    async def close(self) -> None:
        """Wait for the fold that still runs."""
        await self._batches.close()
        await self._halves.close()

    async def _fold(self, events: Sequence[Event]) -> list[Outcome]:
        try:
            await self._batches.one(events)
        except Exception as error:
            if is_database_fault(error):
                raise
        else:
            return [_DONE] * len(events)
        # A record is at fault. The Batcher finds it, by halves.
        results = await self._halves.many(events)
        for result in results:
            if result is not None and is_database_fault(result):
                raise result
        return [_DONE if result is None else Dead(_cause(result)) for result in results]

    def _store_each(self, batches: Sequence[Sequence[Event]]) -> list[None]:
        for events in batches:
            self._store(events)
        return [None] * len(batches)

    def _store(self, events: Sequence[Event]) -> list[None]:
        mx_failures = [event for event in events if isinstance(event, pb.MxFailed)]

        def write(connection: Connection) -> None:
            merge_events(connection, events)
            insert_timeline(connection, events)
            store_failures(connection, mx_failures)

        transaction(self._engine, write)
        return [None] * len(events)

    def _noticed(self, error: BaseException) -> None:
        problem = f"database: {_cause(error)}"
        if problem != self._problem:
            log.warning("waiting for the database", error=_cause(error))
        self._problem = problem


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error_text(error)}"


def stage(status: StatusHandler) -> Stage:
    """Return the status stage for the runtime."""
    return Stage.of(STAGES["status"], handle_batch=status.handle_batch)
