"""Decides how long to wait between two batches, when fetching and when producing.

A batch costs much the same however many records it has. Threads wake, the batch goes to the event loop, and a
produce request follows for every partition. Without a wait a record passes at once, but at a thousand a
second each batch has only two or three. So the wait grows with the rate of records. There is none at a low
rate, and none where a backlog fills the batches anyway.
"""

from __future__ import annotations

from math import exp

__all__ = ["LINGER_MS", "LONGEST_FETCH_WAIT", "LONGEST_PRODUCE_WAIT", "Pace"]

LONGEST_FETCH_WAIT = 0.1
"""The longest wait between two fetches, in seconds: it bounds what a stage adds to a task's time."""

LONGEST_PRODUCE_WAIT = 0.05
"""The longest wait between two bursts of producing, in seconds. Records that one fetch led to come
together and do not wait. Those that come one by one (RPCs, SMTP transactions) are gathered."""

LINGER_MS = 1
"""The producer's linger in milliseconds. The pace makes the batches; this only lets a burst leave as one."""

# Records a second: no wait up to the first, the longest wait from the second on.
_IDLE_RATE = 300.0
_BUSY_RATE = 1000.0
# Seconds over which the rate is averaged.
_WINDOW = 0.5


class Pace:
    """Derives the wait before the next batch from the rate of records. Pure: the caller brings the time."""

    __slots__ = ("_last", "_level", "_until", "longest")

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._level = 0.0
        self._last = 0.0
        self._until = 0.0

    def note_batch(self, count: int, now: float, *, full: bool = False) -> None:
        """Note a batch of `count` records at `now` (monotonic seconds); `full` where more may be waiting."""
        self._level = self._level * exp((self._last - now) / _WINDOW) + count
        self._last = now
        busy = (self._level / _WINDOW - _IDLE_RATE) / (_BUSY_RATE - _IDLE_RATE)
        self._until = now if full else now + self.longest * min(1.0, max(0.0, busy))

    def wait(self, now: float) -> float:
        """Return the seconds to wait before the next batch."""
        return max(0.0, self._until - now)
