"""When a record comes back.

One topic per delay keeps its records roughly in the order of their due times, so that only the head
of each partition has to be watched. Roughly: the jitter lets a record fall due up to a tenth of the
delay before the head, and then it waits for it. Late is allowed, early never. Pure.

A due time is by its writer's clock, and the reader's may differ. So the reader also measures by its monotonic
clock how long it has known of a record, and handles it after the delay and the whole jitter.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

__all__ = ["FirstSeen", "hold", "longest", "look_again", "schedule"]

_JITTER = 0.1


def schedule(delays: Sequence[int], after: float, now_ms: int, rng: random.Random) -> tuple[int, int]:
    """Choose the delay topic for something to be done in `after` seconds.

    Returns the delay in seconds (the shortest of `delays` that is not below `after`, or the longest)
    and the due time in Unix milliseconds: a full delay from `now_ms`, plus up to a tenth, so that what
    failed together does not return together. `delays` are rising; raises ValueError when empty.
    """
    if not delays:
        raise ValueError("no delays to choose from")
    delay = next((d for d in delays if d >= after), delays[-1])
    return delay, now_ms + round(delay * 1000 * (1 + rng.random() * _JITTER))


def look_again(due_at_ms: int, delay: int) -> int:
    """Return when (Unix ms) to read a held partition again, whose head is due at `due_at_ms`.

    A little late (a fiftieth of the delay, a second at most), so that one reading finds all that fell
    due close together: each costs a fetch.
    """
    return due_at_ms + min(1000, delay * 20)


def longest(delay: int) -> float:
    """Return the seconds that a record of this delay (seconds) waits at most."""
    return delay * (1 + _JITTER)


def hold(due_at_ms: int, delay: int, now_ms: int, now: float, since: float) -> float | None:
    """Return until when (monotonic seconds) a head is held; None where it is to be handled now.

    `now_ms` is the Unix time in milliseconds, `now` the monotonic one; the head has been there since `since`.
    """
    end = since + longest(delay)
    if due_at_ms <= now_ms or now >= end:
        return None
    if now + (due_at_ms - now_ms) / 1000 > end:
        # The clocks differ. What is written meanwhile must be seen early, for its wait is measured from then.
        return min(end, now + delay * _JITTER)
    return min(end, now + (look_again(due_at_ms, delay) - now_ms) / 1000)


class FirstSeen:
    """Since when the records of a partition are known to be there, by the reader's monotonic clock.

    It remembers where the partition ended at several times, and rounds a record's time up by `grain` seconds.
    """

    __slots__ = ("_ends",)

    def __init__(self) -> None:
        # Ends, each with the latest and the earliest time that it stands for.
        self._ends: deque[tuple[int, float, float]] = deque()

    def note(self, end: int, now: float, grain: float) -> None:
        """Note that at `now` (monotonic seconds) the partition had all offsets below `end`."""
        if self._ends and end <= self._ends[-1][0]:
            return
        earliest = now
        if self._ends and now - self._ends[-1][2] < grain:
            earliest = self._ends.pop()[2]
        self._ends.append((end, now, earliest))

    def since(self, offset: int, now: float) -> float:
        """Return since when `offset` is there, `now` where it is not known. The offsets must not fall."""
        while self._ends and self._ends[0][0] <= offset:
            self._ends.popleft()
        return self._ends[0][1] if self._ends else now
