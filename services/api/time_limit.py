"""A time limit that thousands of calls share, at the cost of one timer."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Any

__all__ = ["LimitedBlock", "TimeLimit"]


class TimeLimit:
    """Ends `with` blocks that take longer than `seconds`. For one event loop.

    `asyncio.timeout` makes a timer for each block, and nearly every block ends long before. Blocks of one
    limit expire in the order in which they begin, so one timer for the oldest is enough.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._blocks: deque[LimitedBlock] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def block(self) -> LimitedBlock:
        """Return a block of the running task, which raises TimeoutError where it takes too long."""
        return LimitedBlock(self)

    def begin(self, block: LimitedBlock) -> float:
        """Return the deadline of a block that begins now."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._seconds
        self._blocks.append(block)
        if self._timer is None:
            self._timer = loop.call_at(deadline, self._expire, loop)
        return deadline

    def forget_ended(self) -> None:
        """Forget the oldest blocks that have ended."""
        blocks = self._blocks
        while blocks and blocks[0].task is None:
            blocks.popleft()

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self.forget_ended()
        while self._blocks and self._blocks[0].deadline <= loop.time():
            self._blocks.popleft().expire()
            self.forget_ended()
        if self._blocks:
            self._timer = loop.call_at(self._blocks[0].deadline, self._expire, loop)


class LimitedBlock:
    """One `with` block. `task` is None once it has ended."""

    __slots__ = ("_cancellations", "_expired", "_limit", "deadline", "task")

    def __init__(self, limit: TimeLimit) -> None:
        self._limit = limit
        self._expired = False
        self.task: asyncio.Task[Any] | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a limited block needs a task")
        self.task = task
        self._cancellations = task.cancelling()
        self.deadline = self._limit.begin(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self.task = self.task, None
        self._limit.forget_ended()
        if not self._expired or task is None:
            return
        # As in asyncio.timeout: an outer cancellation at the same moment goes on as one.
        if task.uncancel() <= self._cancellations and isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error

    def expire(self) -> None:
        """Cancel the task, whose block turns that into TimeoutError."""
        if self.task is not None:
            self._expired = True
            self.task.cancel()
