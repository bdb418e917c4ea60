"""How long to wait between two batches, of what is fetched and of what is produced.

Each turn costs much the same however many records it brings: threads wake, a batch crosses to the
loop, a produce request follows for every partition. With no wait a record is through at once, but at a
thousand a second every batch holds two or three. So the wait grows with the rate of records: none
while there is little to do, the longest when there is much, and none again where a backlog fills the
batches anyway.
"""

from __future__ import annotations

from math import exp

__all__ = ["LINGER_MS", "LONGEST_FETCH_WAIT", "LONGEST_PRODUCE_WAIT", "Pace"]

LONGEST_FETCH_WAIT = 0.1
"""The longest wait between two fetches, in seconds: it bounds what a stage adds to a task's time."""

LONGEST_PRODUCE_WAIT = 0.05
"""The same between two bursts of producing. What one fetch gave rise to comes together and waits for nothing;
what ends one by one (RPCs, SMTP transactions) is gathered."""

LINGER_MS = 1
"""The producer's linger. Batches are made by the pace; this only lets one burst leave as one."""

# Records a second: up to the first there is no wait, from the second on the longest.
_IDLE = 300.0
_BUSY = 1000.0
_MEMORY = 0.5


class Pace:
    """The wait before the next batch, from the rate of records so far. Pure: the caller brings the time."""

    __slots__ = ("_last", "_level", "_until", "longest")

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._level = 0.0
        self._last = 0.0
        self._until = 0.0

    def note_batch(self, count: int, now: float, *, full: bool = False) -> None:
        """Note a batch of `count` records at `now` (monotonic seconds); `full` if there was no more room."""
        self._level = self._level * exp((self._last - now) / _MEMORY) + count
        self._last = now
        busy = (self._level / _MEMORY - _IDLE) / (_BUSY - _IDLE)
        self._until = now if full else now + self.longest * min(1.0, max(0.0, busy))

    def wait(self, now: float) -> float:
        """Return the seconds to wait before the next batch, 0 when none."""
        return max(0.0, self._until - now)
