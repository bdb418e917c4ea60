"""Partitions read at their own paces, put into one line by their records' times. Pure.

Nothing is let through before every partition that is still read has shown what it has next. So what one
of them is ahead of the others is kept; `ahead` says where to stop reading for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush

from services.api.watch.changes import Change, Place

__all__ = ["Merge"]


class Merge:
    """Merges these partitions. About `most` changes are kept at a time, and what was on its way.

    A partition that is not read for a while loses what was fetched ahead; so it happens to all at once, and
    seldom.
    """

    def __init__(self, places: Iterable[Place], most: int = 20_000) -> None:
        self._most, self._kept, self._full = most, 0, False
        self._waiting: dict[Place, deque[tuple[int, Change]]] = {place: deque() for place in places}
        self._silent = set(self._waiting)
        self._heads: list[tuple[int, Place]] = []
        self._ended: set[Place] = set()
        self._latest = dict.fromkeys(self._waiting, 0)

    def put(self, change: Change) -> None:
        """Add a partition's next change."""
        place = change.place
        # A partition's times may step back; its order stands.
        at = self._latest[place] = max(self._latest[place], change.at_ms)
        waiting = self._waiting[place]
        waiting.append((at, change))
        self._kept += 1
        if len(waiting) == 1:
            self._silent.discard(place)
            heappush(self._heads, (at, place))

    def end(self, place: Place) -> None:
        """Wait for no more of this partition."""
        self._ended.add(place)
        self._silent.discard(place)

    def take(self) -> list[Change]:
        """Return what comes next, as far as that is certain."""
        taken: list[Change] = []
        while self._heads and not self._silent:
            _, place = heappop(self._heads)
            waiting = self._waiting[place]
            taken.append(waiting.popleft()[1])
            self._kept -= 1
            if waiting:
                heappush(self._heads, (waiting[0][0], place))
            elif place not in self._ended:
                self._silent.add(place)
        return taken

    def ahead(self) -> set[Place]:
        """Return the partitions that are not to be read now: the others must come up to them."""
        self._full = self._kept >= self._most or (self._full and self._kept > self._most // 2)
        if not self._full:
            return set()
        enough = max(1, self._most // 200)
        return {place for place, waiting in self._waiting.items() if len(waiting) >= enough}

    def first(self) -> dict[Place, int]:
        """Return the offset of the first change that is kept of each partition, where there is one."""
        return {place: waiting[0][1].offset for place, waiting in self._waiting.items() if waiting}
