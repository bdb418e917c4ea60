"""The loop's side of a stage: records in, handlers run, outcomes published, records given back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial

import structlog

from services.common.database.errors import error_text
from services.common.kafka.publisher import Failure, Publisher
from services.common.kafka.records import OutgoingRecord
from services.common.stage import metrics
from services.common.stage.batches import Batches
from services.common.stage.ledger import Assignment, Fetched
from services.common.stage.outgoing import Render
from services.common.stage.republish import Pending, Republisher
from services.common.stage.types import Dead, Done, Outcome, Retry, Stage

__all__ = ["Work"]

log = structlog.get_logger(__name__)

_OUTCOMES = (Done, Retry, Dead)
_NAMES = {Done: "done", Retry: "retry", Dead: "dead"}
# How soon a handler that was cancelled, though its partition is still ours, is run again.
_AGAIN = 1.0


class Work:
    """Runs a stage's handler over what the poller brings. All methods run on the loop's thread.

    Nothing is given back as finished before all that it gave rise to is acked. A handler that answers at
    once costs no task; what settles in one turn of the loop is published together and given back together.
    """

    def __init__(
        self, stage: Stage, render: Render, publisher: Publisher, give_back: Callable[[list[Fetched]], None]
    ) -> None:
        if (stage.handle is None) == (stage.handle_batch is None):
            raise ValueError(f"stage {stage.name} must have one of handle and handle_batch")
        self._handle = stage.handle
        self._render, self._publisher, self._give_back = render, publisher, give_back
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[Fetched, asyncio.Future[Outcome]] = {}
        self._again: dict[Fetched, asyncio.TimerHandle] = {}
        self._settled: list[tuple[Fetched, Outcome]] = []
        self._flushing = False
        self._draining = False
        self._counts = {kind: metrics.STAGE_RECORDS.labels(stage.name, name) for kind, name in _NAMES.items()}
        self._observe = metrics.STAGE_HANDLER_SECONDS.labels(stage.name).observe
        self._batches = (
            Batches(stage.handle_batch, self._settle_all, self._abandon, self._observe)
            if stage.handle_batch
            else None
        )
        self._republisher = Republisher(
            publisher,
            metrics.STAGE_PUBLISH_FAILURES.labels(stage.name),
            render,
            self._republished,
            self._abandon,
        )

    def take(self, records: Sequence[Fetched]) -> None:
        """Begin with records that the poller fetched."""
        if self._batches is not None:
            sound = [record for record in records if record.fault is None]
            self._batches.put(sound)
        else:
            sound = []
            started = time.perf_counter()
            for record in records:
                if record.fault is None:
                    self._begin(record)
            self._observe(time.perf_counter() - started)
        if len(sound) != len(records):
            self._settle_all([(r, Dead(r.fault)) for r in records if r.fault is not None])
        self._flush()

    def cancel(self, assignments: Collection[Assignment] | None = None) -> None:
        """Stop working for these assignments (None: for all, for good): their records stay unfinished."""
        self._draining = self._draining or assignments is None

        def meant(record: Fetched) -> bool:
            return assignments is None or record.assignment in assignments

        for record in [record for record in self._tasks if meant(record)]:
            self._tasks[record].cancel()
        for record in [record for record in self._again if meant(record)]:
            self._again.pop(record).cancel()
            self._abandon([record])
        self._republisher.abandon(meant)
        if self._batches is not None:
            self._batches.cancel(meant)

    async def ended(self, seconds: float) -> None:
        """Return once the handlers have ended that were cancelled, or after so long."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=seconds)

    def problems(self) -> list[str]:
        """Return what keeps this stage from getting on. May be called from another thread."""
        problems = self._batches.problems() if self._batches is not None else []
        if self._republisher:
            problems.append(f"{len(self._republisher)} records wait for their events to be published")
        return problems

    # --- handlers ----------------------------------------------------------------------------

    def _begin(self, record: Fetched) -> None:
        try:
            answer = self._handle(record)  # type: ignore[misc]
        except Exception as error:
            answer = _blame(record, error)
        if isinstance(answer, _OUTCOMES):
            self._settled.append((record, answer))
        elif not isinstance(answer, Awaitable):
            self._settled.append((record, _blame(record, TypeError(f"{answer!r} is no outcome"))))
        else:
            task = asyncio.ensure_future(answer)
            self._tasks[record] = task
            task.add_done_callback(partial(self._ended, record))

    def _ended(self, record: Fetched, task: asyncio.Future[Outcome]) -> None:
        del self._tasks[record]
        if task.cancelled():
            self._cancelled(record)
            return
        error = task.exception()
        if error is None:
            self._settled.append((record, task.result()))
        else:
            self._settled.append((record, _blame(record, error)))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _cancelled(self, record: Fetched) -> None:
        if record.assignment.live and not self._draining:
            self._again[record] = self._loop.call_later(_AGAIN, self._rerun, record)
        else:
            self._abandon([record])

    def _rerun(self, record: Fetched) -> None:
        del self._again[record]
        self._begin(record)
        self._flush()

    def _abandon(self, records: list[Fetched]) -> None:
        if records:
            self._give_back(records)

    # --- outcomes ----------------------------------------------------------------------------

    def _settle_all(self, settled: list[tuple[Fetched, Outcome]]) -> None:
        self._settled += settled
        self._flush()

    def _flush(self) -> None:
        self._flushing = False
        settled, self._settled = self._settled, []
        outgoing: list[OutgoingRecord] = []
        owners: list[Fetched] = []
        outcomes: dict[Fetched, Outcome] = {}
        finished: list[Fetched] = []
        for record, outcome in settled:
            rendered, final = self._rendered(record, outcome)
            if rendered:
                outgoing += rendered
                owners += [record] * len(rendered)
                outcomes[record] = final
            else:
                finished.append(record)
        if outgoing:
            self._publisher.send(outgoing, partial(self._delivered, outcomes, outgoing, owners))
        if finished:
            self._counts[Done].inc(len(finished))
            self._finish(finished)

    def _rendered(self, record: Fetched, outcome: Outcome) -> tuple[list[OutgoingRecord], Outcome]:
        try:
            return self._render(record, outcome), outcome
        except Exception as error:
            dead = _blame(record, error)
            return self._render(record, dead), dead

    def _delivered(
        self,
        outcomes: dict[Fetched, Outcome],
        outgoing: list[OutgoingRecord],
        owners: list[Fetched],
        failures: list[Failure],
    ) -> None:
        for record, error in {owners[index]: error for index, error in failures}.items():
            mine = [item for item, owner in zip(outgoing, owners, strict=True) if owner is record]
            self._republisher.add(Pending(record, outcomes.pop(record), mine), error)
        for kind, count in Counter(map(type, outcomes.values())).items():
            self._counts[kind].inc(count)
        self._finish(list(outcomes))

    def _republished(self, pending: list[Pending]) -> None:
        for one in pending:
            self._counts[type(one.outcome)].inc()
        self._finish([one.record for one in pending])

    def _finish(self, records: list[Fetched]) -> None:
        for record in records:
            record.finished = True
        self._give_back(records)


def _blame(record: Fetched, error: BaseException) -> Dead:
    log.error(
        "handler failed",
        topic=record.topic,
        partition=record.assignment.partition,
        offset=record.offset,
        exc_info=error,
    )
    return Dead(f"{type(error).__name__}: {error_text(error)}")
