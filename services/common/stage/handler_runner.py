"""Runs a stage's handler over the records that the poller fetched, and publishes the outcomes.

Everything here runs on the event loop's thread. poller.py is the other half, on a thread of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial

import structlog

from services.common.database.errors import error_text
from services.common.kafka.publisher import Publisher, PublishFailure
from services.common.kafka.records import OutgoingRecord
from services.common.stage import metrics
from services.common.stage.batch_runner import BatchRunner
from services.common.stage.in_flight_record import Assignment, InFlightRecord
from services.common.stage.outcome_encoder import OutcomeEncoder
from services.common.stage.republisher import PendingOutcome, Republisher
from services.common.stage.types import Dead, Done, Outcome, Record, Retry, Stage

__all__ = ["HandlerRunner"]

log = structlog.get_logger(__name__)

_OUTCOMES = (Done, Retry, Dead)
_NAMES = {Done: "done", Retry: "retry", Dead: "dead"}
# Seconds before a handler that cancelled itself is called again.
_RESTART_PAUSE = 1.0


class HandlerRunner:
    """Calls the handler, publishes what its outcomes lead to, and releases the records.

    A record is released as finished only after every record that it led to is acked. A handler that returns
    an outcome without awaiting costs no task, and `handle_all` costs none. Outcomes of one turn of the loop
    are published in one batch.
    """

    def __init__(
        self,
        stage: Stage,
        encode: OutcomeEncoder,
        publisher: Publisher,
        release: Callable[[list[InFlightRecord]], None],
    ) -> None:
        if [stage.handle, stage.handle_batch, stage.handle_all].count(None) != 2:
            raise ValueError(f"stage {stage.name} must have one of handle, handle_batch and handle_all")
        self._handle, self._handle_all = stage.handle, stage.handle_all
        self._encode, self._publisher, self._release = encode, publisher, release
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[InFlightRecord, asyncio.Future[Outcome]] = {}
        self._restarts: dict[InFlightRecord, asyncio.TimerHandle] = {}
        # The records that `handle_all` has not finished.
        self._unfinished: dict[Record, InFlightRecord] = {}
        self._outcomes: list[tuple[InFlightRecord, Outcome]] = []
        self._flushing = False
        self._draining = False
        self._counts = {kind: metrics.STAGE_RECORDS.labels(stage.name, name) for kind, name in _NAMES.items()}
        self._observe = metrics.STAGE_BATCH_SECONDS.labels(stage.name).observe
        self._batches = (
            BatchRunner(stage.handle_batch, self._on_outcomes, self._abandon, self._observe)
            if stage.handle_batch
            else None
        )
        self._republisher = Republisher(
            publisher,
            metrics.STAGE_PUBLISH_FAILURES.labels(stage.name),
            encode,
            self._on_republished,
            self._abandon,
        )

    def start(self, records: Sequence[InFlightRecord]) -> None:
        """Start to handle records that the poller fetched. An undecodable one becomes a dead letter."""
        sound = [record for record in records if record.undecodable is None]
        if self._batches is not None:
            self._batches.put(sound)
        else:
            started = time.perf_counter()
            if self._handle_all is not None:
                self._unfinished.update(zip(sound, sound, strict=True))
                self._handle_all.start(sound, self._on_finished)
            else:
                for record in sound:
                    self._start_handler(record)
            self._observe(time.perf_counter() - started)
        if len(sound) != len(records):
            self._on_outcomes([(r, Dead(r.undecodable)) for r in records if r.undecodable is not None])
        self._flush()

    def cancel(self, assignments: Collection[Assignment] | None = None) -> None:
        """Stop working for these assignments (None: for all, for good): their records stay unfinished."""
        self._draining = self._draining or assignments is None

        def matches(record: InFlightRecord) -> bool:
            return assignments is None or record.assignment in assignments

        for record in [record for record in self._tasks if matches(record)]:
            self._tasks[record].cancel()
        for record in [record for record in self._restarts if matches(record)]:
            self._restarts.pop(record).cancel()
            self._abandon([record])
        gone = [record for record in self._unfinished.values() if matches(record)]
        if gone and self._handle_all is not None:
            for record in gone:
                del self._unfinished[record]
            self._handle_all.cancel(gone)
            self._abandon(gone)
        self._republisher.abandon(matches)
        if self._batches is not None:
            self._batches.cancel(matches)

    async def wait_cancelled(self, seconds: float) -> None:
        """Return once the cancelled handlers have ended, or after `seconds`."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=seconds)

    def problems(self) -> list[str]:
        """Return what keeps the stage from progress, empty where nothing does. Safe from any thread."""
        problems = self._batches.problems() if self._batches is not None else []
        if self._republisher:
            problems.append(f"{len(self._republisher)} records wait for their events to be published")
        return problems

    # --- handlers ----------------------------------------------------------------------------

    def _start_handler(self, record: InFlightRecord) -> None:
        try:
            answer = self._handle(record)  # type: ignore[misc]
        except Exception as error:
            answer = _dead_by_error(record, error)
        if isinstance(answer, _OUTCOMES):
            self._outcomes.append((record, answer))
        elif not isinstance(answer, Awaitable):
            self._outcomes.append((record, _dead_by_error(record, TypeError(f"{answer!r} is no outcome"))))
        else:
            task = asyncio.ensure_future(answer)
            self._tasks[record] = task
            task.add_done_callback(partial(self._on_handler_end, record))

    def _on_handler_end(self, record: InFlightRecord, task: asyncio.Future[Outcome]) -> None:
        del self._tasks[record]
        if task.cancelled():
            self._on_cancelled(record)
            return
        error = task.exception()
        if error is None:
            self._outcomes.append((record, task.result()))
        else:
            self._outcomes.append((record, _dead_by_error(record, error)))
        self._flush_soon()

    def _on_finished(self, outcomes: Sequence[tuple[Record, Outcome | Exception]]) -> None:
        for record, outcome in outcomes:
            mine = self._unfinished.pop(record, None)
            if mine is not None:
                final = _dead_by_error(mine, outcome) if isinstance(outcome, Exception) else outcome
                self._outcomes.append((mine, final))
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _on_cancelled(self, record: InFlightRecord) -> None:
        if record.assignment.live and not self._draining:
            # The handler cancelled itself, for its partition is still owned.
            self._restarts[record] = self._loop.call_later(_RESTART_PAUSE, self._restart, record)
        else:
            self._abandon([record])

    def _restart(self, record: InFlightRecord) -> None:
        del self._restarts[record]
        self._start_handler(record)
        self._flush()

    def _abandon(self, records: list[InFlightRecord]) -> None:
        if records:
            self._release(records)

    # --- outcomes ----------------------------------------------------------------------------

    def _on_outcomes(self, outcomes: list[tuple[InFlightRecord, Outcome]]) -> None:
        self._outcomes += outcomes
        self._flush()

    def _flush(self) -> None:
        """Publish what the outcomes lead to; finish at once the records whose outcome leads to nothing."""
        self._flushing = False
        settled, self._outcomes = self._outcomes, []
        outgoing: list[OutgoingRecord] = []
        owners: list[InFlightRecord] = []
        outcomes: dict[InFlightRecord, Outcome] = {}
        finished: list[InFlightRecord] = []
        for record, outcome in settled:
            encoded, final = self._encoded(record, outcome)
            if encoded:
                outgoing += encoded
                owners += [record] * len(encoded)
                outcomes[record] = final
            else:
                finished.append(record)
        if outgoing:
            self._publisher.send(outgoing, partial(self._on_published, outcomes, outgoing, owners))
        if finished:
            self._counts[Done].inc(len(finished))
            self._finish(finished)

    def _encoded(self, record: InFlightRecord, outcome: Outcome) -> tuple[list[OutgoingRecord], Outcome]:
        try:
            return self._encode(record, outcome), outcome
        except Exception as error:
            dead = _dead_by_error(record, error)
            return self._encode(record, dead), dead

    def _on_published(
        self,
        outcomes: dict[InFlightRecord, Outcome],
        outgoing: list[OutgoingRecord],
        owners: list[InFlightRecord],
        failures: list[PublishFailure],
    ) -> None:
        for record, error in {owners[index]: error for index, error in failures}.items():
            mine = [item for item, owner in zip(outgoing, owners, strict=True) if owner is record]
            self._republisher.add(PendingOutcome(record, outcomes.pop(record), mine), error)
        for kind, count in Counter(map(type, outcomes.values())).items():
            self._counts[kind].inc(count)
        self._finish(list(outcomes))

    def _on_republished(self, pending: list[PendingOutcome]) -> None:
        for one in pending:
            self._counts[type(one.outcome)].inc()
        self._finish([one.record for one in pending])

    def _finish(self, records: list[InFlightRecord]) -> None:
        for record in records:
            record.finished = True
        self._release(records)


def _dead_by_error(record: InFlightRecord, error: BaseException) -> Dead:
    """Log what a handler raised, and return the outcome that it makes: a dead letter with that cause."""
    log.error(
        "handler failed",
        topic=record.topic,
        partition=record.assignment.partition,
        offset=record.offset,
        exc_info=error,
    )
    return Dead(f"{type(error).__name__}: {error_text(error)}")
