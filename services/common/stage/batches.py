"""Running a batch handler: one batch at a time, what arrives meanwhile makes the next."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from services.common.database.errors import error_text
from services.common.stage.ledger import Fetched
from services.common.stage.types import BatchHandler, Outcome

__all__ = ["Batches"]

log = structlog.get_logger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0


class Batches:
    """Hands records to `handle` in batches of up to `most`, in their order.

    A batch whose handler raises is handled again after a growing pause, for ever: the fault is not one
    record's. `settle` takes each batch's outcomes, `abandon` the records whose partition went away.
    """

    def __init__(
        self,
        handle: BatchHandler,
        settle: Callable[[list[tuple[Fetched, Outcome]]], None],
        abandon: Callable[[list[Fetched]], None],
        observe: Callable[[float], None],
        most: int = 500,
    ) -> None:
        self._handle, self._settle, self._abandon = handle, settle, abandon
        self._observe, self._most = observe, most
        self._queue: deque[Fetched] = deque()
        self._batch: list[Fetched] = []
        self._running: asyncio.Task[Sequence[Outcome]] | None = None
        self._worker: asyncio.Task[None] | None = None
        self._problem: str | None = None

    def put(self, records: Sequence[Fetched]) -> None:
        """Queue records."""
        self._queue.extend(records)
        if self._queue and self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())

    def cancel(self, meant: Callable[[Fetched], bool]) -> None:
        """Give these records up. A batch at hand that holds any is stopped; the rest of it starts anew."""
        gone = [record for record in self._queue if meant(record)]
        if gone:
            self._queue = deque(record for record in self._queue if not meant(record))
        kept = [record for record in self._batch if not meant(record)]
        if len(kept) != len(self._batch):
            gone += [record for record in self._batch if meant(record)]
            self._batch = kept
            if self._running is not None:
                self._running.cancel()
        self._abandon(gone)

    def problems(self) -> list[str]:
        """Return why the batch at hand does not get on."""
        return [self._problem] if self._problem else []

    async def _work(self) -> None:
        pause = _FIRST_PAUSE
        while self._batch or self._queue:
            if not self._batch:
                self._batch = [self._queue.popleft() for _ in range(min(self._most, len(self._queue)))]
            outcomes = await self._attempt(self._batch)
            if outcomes is not None:
                settled, self._batch = self._batch, []
                pause, self._problem = _FIRST_PAUSE, None
                self._settle(list(zip(settled, outcomes, strict=True)))
            elif self._problem:
                await asyncio.sleep(pause)
                pause = min(_LONGEST_PAUSE, 2 * pause)
        self._worker, self._problem = None, None

    async def _attempt(self, batch: list[Fetched]) -> Sequence[Outcome] | None:
        """Return the outcomes, or None when the batch is to be handled again."""
        started = time.perf_counter()
        self._running = asyncio.ensure_future(self._handle(batch))
        try:
            outcomes = await self._running
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Either these records were given up, or the handler cancelled itself: then it is tried again.
            if self._batch is batch:
                self._problem = "the batch handler was cancelled"
            return None
        except Exception as error:
            log.exception("batch handler failed, trying again", records=len(batch))
            self._problem = f"batch handler: {type(error).__name__}: {error_text(error)}"
            return None
        finally:
            self._running = None
        self._observe(time.perf_counter() - started)
        if self._batch is not batch:
            return None
        if len(outcomes) != len(batch):
            log.error("batch handler answered another number", records=len(batch), outcomes=len(outcomes))
            self._problem = f"batch handler: {len(outcomes)} outcomes for {len(batch)} records"
            return None
        return outcomes
