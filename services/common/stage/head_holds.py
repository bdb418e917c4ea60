"""Says until when the head of a delay topic's partition holds it.

The stage compares only the head of each partition with the clock. A record behind the head that is due before
it waits for the head and comes late.

The writer's clock sets the due time, and the reader's clock may be another one. So the reader also measures,
by its monotonic clock, how long it has known a record. It handles the record once it is due, or once the
delay and a tenth are over. Pure.
"""

from __future__ import annotations

from collections import deque

from services.common.stage.delays import JITTER, longest_wait

__all__ = ["FirstSeen", "held_until", "next_look_ms"]


def next_look_ms(due_at_ms: int, delay: int) -> int:
    """Return when (Unix ms) to read a held partition again, whose head is due at `due_at_ms`.

    That is a fiftieth of the delay late, at most a second. Each look costs a fetch, and one look then finds
    all records that became due close together.
    """
    return due_at_ms + min(1000, delay * 20)


def held_until(due_at_ms: int, delay: int, now_ms: int, now: float, since: float) -> float | None:
    """Return until when (monotonic seconds) a partition's head holds it; None where the head is due.

    `now_ms` is the Unix time in milliseconds, `now` the monotonic time. The head is known since `since`.
    """
    end = since + longest_wait(delay)
    if due_at_ms <= now_ms or now >= end:
        return None
    if now + (due_at_ms - now_ms) / 1000 > end:
        # The clocks differ. Records written meanwhile must be seen early: their wait counts from then.
        return min(end, now + delay * JITTER)
    return min(end, now + (next_look_ms(due_at_ms, delay) - now_ms) / 1000)


class FirstSeen:
    """Remembers since when the records of one partition are known, by the reader's monotonic clock.

    It keeps the partition's end offset at several times. A record's time is up to `grain` seconds late.
    """

    __slots__ = ("_ends",)

    def __init__(self) -> None:
        # End offsets, each with the latest and the earliest time that it stands for.
        self._ends: deque[tuple[int, float, float]] = deque()

    def note(self, end: int, now: float, grain: float) -> None:
        """Note that at `now` (monotonic seconds) the partition had all records below the offset `end`."""
        if self._ends and end <= self._ends[-1][0]:
            return
        earliest = now
        if self._ends and now - self._ends[-1][2] < grain:
            earliest = self._ends.pop()[2]
        self._ends.append((end, now, earliest))

    def since(self, offset: int, now: float) -> float:
        """Return since when the record at `offset` is known, `now` for an unknown one.

        A call drops what lies below `offset`, so the offsets of successive calls must not fall.
        """
        while self._ends and self._ends[0][0] <= offset:
            self._ends.popleft()
        return self._ends[0][1] if self._ends else now
