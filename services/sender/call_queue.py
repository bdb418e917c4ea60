"""A queue before calls that take many items: what arrives during one call makes the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

__all__ = ["CallQueue"]

T = TypeVar("T")

_MOST = 500


class CallQueue(Generic[T]):
    """Calls `call` with the items that wait, up to 500, one call at a time. Belongs to one event loop.

    The first call comes in the loop's next turn, with all items of the present one. `call` may not raise.
    """

    def __init__(self, call: Callable[[list[T]], Awaitable[None]]) -> None:
        self._call = call
        self._items: list[T] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, item: T) -> None:
        """Queue an item. Does not block."""
        self._items.append(item)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._items:
                items, self._items = self._items[:_MOST], self._items[_MOST:]
                await self._call(items)
        finally:
            self._task = None
