"""A queue before calls that take many items: what arrives during one call makes the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from services.common.kafka.pace import Pace

__all__ = ["CallQueue"]

T = TypeVar("T")

_MAX_ITEMS = 500
# The longest wait (seconds) for more items, at a high rate. A call costs much the same however few it has.
_LONGEST_WAIT = 0.005


class CallQueue(Generic[T]):
    """Calls `call` with the items that wait, up to 500, one call at a time. Belongs to one event loop.

    The first call comes in the loop's next turn, with all items of the present one. At a high rate the queue
    gathers items for a moment (pace.py). `call` must not raise.
    """

    def __init__(self, call: Callable[[list[T]], Awaitable[None]]) -> None:
        self._call = call
        self._items: list[T] = []
        self._task: asyncio.Task[None] | None = None
        self._pace = Pace(_LONGEST_WAIT)

    def add(self, item: T) -> None:
        """Queue an item. Does not block."""
        self._items.append(item)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        now = asyncio.get_running_loop().time
        try:
            while self._items:
                wait = self._pace.wait(now())
                if wait:
                    await asyncio.sleep(wait)
                items, self._items = self._items[:_MAX_ITEMS], self._items[_MAX_ITEMS:]
                await self._call(items)
                self._pace.note_batch(len(items), now(), full=len(items) == _MAX_ITEMS)
        finally:
            self._task = None
