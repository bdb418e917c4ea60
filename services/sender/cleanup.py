"""Work that goes on after its record was cancelled: releasing a claim, storing an outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog

__all__ = ["Cleanups", "within"]

log = structlog.get_logger(__name__)

R = TypeVar("R")


class Cleanups:
    """The cleanups of one sender, each a task of its own. Belongs to one event loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[object]] = set()
        self.handed_over = 0
        """Handed-over mails whose records were cancelled and whose outcomes are not stored yet."""

    def run(
        self,
        work: Coroutine[Any, Any, object],
        release: Callable[[], None] | None = None,
        *,
        handed_over: bool = False,
    ) -> None:
        """Start `work`. When it ends, call `release`, which returns what the attempt held.

        `handed_over` says that the work is about a mail that was handed over.
        """
        self.handed_over += handed_over
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)

        def done(task: asyncio.Task[object]) -> None:
            self._running.discard(task)
            self.handed_over -= handed_over
            if release is not None:
                release()

        task.add_done_callback(done)

    async def close(self) -> None:
        """Wait until all cleanups have ended, also those that start meanwhile."""
        if self.handed_over:
            log.info("mails were handed over: waiting for their replies", mails=self.handed_over)
        while self._running:
            await asyncio.wait(self._running)


async def within(work: Awaitable[R], seconds: float) -> R | None:
    """Return the result of `work`, or raise its error.

    After `seconds`, cancel it, log that, and return None.
    """
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        log.warning("a cleanup took too long and was given up", seconds=seconds)
        return None
