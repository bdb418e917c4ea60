"""A watcher on its way to the live feed, and how long others may wait for its client."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping

from services.api.watch.changes import Place
from services.api.watch.feed import Feed, Joined
from services.api.watch.members import Member
from services.api.watch.problems import gone, lagging
from services.api.watch.watchers import Told, Watcher

__all__ = ["KEPT_WAITING", "PATIENCE", "Traveller"]

PATIENCE = 20.0
"""Seconds that a watcher may take for some messages of what it missed, where it keeps nobody waiting."""
KEPT_WAITING = 5.0
"""Seconds in all that a watcher may keep others waiting by taking few messages or none."""

_MOST_WAITING = 100
# While a watcher's queue is full, it is looked at so often (seconds) whether it has taken fewer messages than
# these. Watchers that are quick share the event loop; each of a few hundred takes more.
_LOOK_EVERY, _FEW = 0.25, 5


class Traveller(Member):
    """A member on its way; what was missed waits here until its stream takes it.

    `wanted` tells whether anybody waits for a way of its own.
    """

    def __init__(
        self, feed: Feed, watcher: Watcher, positions: Mapping[Place, int], wanted: Callable[[], bool]
    ) -> None:
        super().__init__(watcher, positions)
        self.feed, self._wanted = feed, wanted
        self.joined: Joined | None = None
        self.away = False
        self.companions: set[Traveller] = set()
        self.task: asyncio.Task[None] | None = None
        self._kept_waiting = 0.0
        self._queue: deque[Told] = deque()
        self._filled, self._room = asyncio.Event(), asyncio.Event()

    async def put(self, told: Told) -> None:
        """Queue a message. Where many wait and too few are taken in time, the watcher is ended."""
        if len(self._queue) >= _MOST_WAITING and not self.away and not await self._has_room():
            self.watcher.end(lagging())
            self.leave()
        self.add(told)

    def add(self, told: Told) -> None:
        """Queue a message, however many wait."""
        if not self.away:
            self._queue.append(told)
            self._filled.set()

    def arrive(self, joined: Joined) -> None:
        """Nothing more was missed."""
        self.joined = joined
        self._filled.set()

    async def missed(self) -> AsyncIterator[Told]:
        """Yield what was missed, until it has joined."""
        while self._queue or self.joined is None:
            self._filled.clear()
            if not self._queue:
                await self._filled.wait()
            while self._queue:
                yield self._queue.popleft()
                if len(self._queue) <= _MOST_WAITING // 2:
                    self._room.set()

    async def _has_room(self) -> bool:
        """Wait until half of the messages are taken; return False where that takes too long."""
        self._room.clear()
        end = time.monotonic() + PATIENCE
        while (start := time.monotonic()) < end:
            before = len(self._queue)
            try:
                async with asyncio.timeout(_LOOK_EVERY):
                    await self._room.wait()
                return True
            except TimeoutError:
                pass
            if before - len(self._queue) < _FEW and (self._wanted() or self._holds_up_companions()):
                self._kept_waiting += time.monotonic() - start
                if self._kept_waiting > KEPT_WAITING:
                    return False
        return False

    def _holds_up_companions(self) -> bool:
        """Whether one of them has taken all its messages; those who are as slow have not."""
        return any(not other._queue for other in self.companions)

    def lose(self) -> None:
        """End its watcher, of what it missed records are gone; the others go on."""
        self.watcher.end(gone())
        self.leave()

    def leave(self) -> None:
        """Go no further; where nobody else goes on, nothing more is read."""
        self.away = True
        self._queue.clear()
        self._room.set()
        self.companions.discard(self)
        if self.task is not None and not self.companions:
            self.task.cancel()
