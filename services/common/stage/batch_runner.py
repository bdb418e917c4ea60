"""Runs a stage's batch handler, one batch at a time, and repeats a failed batch without end.

Records that arrive meanwhile form the next batch.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from services.common.database.errors import error_text
from services.common.stage.in_flight_record import InFlightRecord
from services.common.stage.types import BatchHandler, Outcome

__all__ = ["BatchRunner"]

log = structlog.get_logger(__name__)

# Seconds before a failed batch is handled again: they double from the first to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0


class BatchRunner:
    """Calls `handle` with batches of up to `most` records, in the order in which they came.

    When the handler raises, the runner handles the same batch again after a growing pause, without end: the
    cause is not one record. `on_outcomes` takes each batch's outcomes, `on_abandoned` the records whose
    partition left, `observe` the seconds that a call took. Use it on the loop's thread.
    """

    def __init__(
        self,
        handle: BatchHandler,
        on_outcomes: Callable[[list[tuple[InFlightRecord, Outcome]]], None],
        on_abandoned: Callable[[list[InFlightRecord]], None],
        observe: Callable[[float], None],
        most: int = 500,
    ) -> None:
        self._handle, self._on_outcomes, self._on_abandoned = handle, on_outcomes, on_abandoned
        self._observe, self._most = observe, most
        self._queue: deque[InFlightRecord] = deque()
        self._batch: list[InFlightRecord] = []
        self._call: asyncio.Task[Sequence[Outcome]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._problem: str | None = None

    def put(self, records: Sequence[InFlightRecord]) -> None:
        """Queue records. Does not block."""
        self._queue.extend(records)
        if self._queue and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def cancel(self, matches: Callable[[InFlightRecord], bool]) -> None:
        """Abandon the records that match. If the present batch has any, the rest of it is handled anew."""
        gone = [record for record in self._queue if matches(record)]
        if gone:
            self._queue = deque(record for record in self._queue if not matches(record))
        kept = [record for record in self._batch if not matches(record)]
        if len(kept) != len(self._batch):
            gone += [record for record in self._batch if matches(record)]
            self._batch = kept
            if self._call is not None:
                self._call.cancel()
        self._on_abandoned(gone)

    def problems(self) -> list[str]:
        """Return why the present batch makes no progress, empty where it does."""
        return [self._problem] if self._problem else []

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while self._batch or self._queue:
            if not self._batch:
                self._batch = [self._queue.popleft() for _ in range(min(self._most, len(self._queue)))]
            outcomes = await self._handle_batch(self._batch)
            if outcomes is not None:
                handled, self._batch = self._batch, []
                pause, self._problem = _FIRST_PAUSE, None
                self._on_outcomes(list(zip(handled, outcomes, strict=True)))
            elif self._problem:
                await asyncio.sleep(pause)
                pause = min(_LONGEST_PAUSE, 2 * pause)
        self._task, self._problem = None, None

    async def _handle_batch(self, batch: list[InFlightRecord]) -> Sequence[Outcome] | None:
        """Return the outcomes, or None where the batch must be handled again."""
        started = time.perf_counter()
        self._call = asyncio.ensure_future(self._handle(batch))
        try:
            outcomes = await self._call
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Either `cancel` took records out of the batch, or the handler cancelled itself.
            if self._batch is batch:
                self._problem = "the batch handler was cancelled"
            return None
        except Exception as error:
            log.exception("the batch handler failed and is called again", records=len(batch))
            self._problem = f"batch handler: {type(error).__name__}: {error_text(error)}"
            return None
        finally:
            self._call = None
        self._observe(time.perf_counter() - started)
        if self._batch is not batch:
            return None
        if len(outcomes) != len(batch):
            log.error(
                "the batch handler returned another number of outcomes than it got records",
                records=len(batch),
                outcomes=len(outcomes),
            )
            self._problem = f"batch handler: {len(outcomes)} outcomes for {len(batch)} records"
            return None
        return outcomes
