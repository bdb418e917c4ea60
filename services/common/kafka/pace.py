"""Decides how long to wait between two batches, when fetching and when producing.

A batch costs much the same however many records it has. Threads wake, the batch goes to the event loop, and a
produce request follows for every partition. Without a wait a record passes at once, but at a thousand a
second each batch has only two or three. So the wait grows with the rate of records. A low rate needs no
wait, and neither does a backlog, which fills the batches anyway.
"""

from __future__ import annotations

from math import exp

__all__ = ["LINGER_MS", "Pace", "awaited_fetches", "awaited_records", "gathered_fetches", "gathered_records"]

LINGER_MS = 1
"""The producer's linger in milliseconds. The pace makes the batches; this only lets a burst leave as one."""

# Seconds over which the rate is averaged.
_WINDOW = 0.5


class Pace:
    """Derives the wait before the next batch from the rate of records. Pure: the caller brings the time.

    There is no wait up to `idle` records a second, and the `longest` one (seconds) from `busy` on.
    """

    __slots__ = ("_busy", "_idle", "_last", "_level", "_until", "longest")

    def __init__(self, longest: float, *, idle: float = 300.0, busy: float = 1000.0) -> None:
        self.longest = longest
        self._idle, self._busy = idle, busy
        self._level = 0.0
        self._last = 0.0
        self._until = 0.0

    def note_batch(self, count: int, now: float, *, full: bool = False) -> None:
        """Note a batch of `count` records at `now` (monotonic seconds); `full` where more may be waiting."""
        self._level = self._level * exp((self._last - now) / _WINDOW) + count
        self._last = now
        busy = (self._level / _WINDOW - self._idle) / (self._busy - self._idle)
        self._until = now if full else now + self.longest * min(1.0, max(0.0, busy))

    def wait(self, now: float) -> float:
        """Return the seconds to wait before the next batch."""
        return max(0.0, self._until - now)


def awaited_fetches() -> Pace:
    """Return the pace of fetches for which a task waits: each stage adds so much to its time."""
    return Pace(0.04)


def awaited_records() -> Pace:
    """Return the pace of producing records for which a task waits.

    Records that one fetch led to come together and do not wait. Those that come one by one are gathered.
    """
    return Pace(0.015)


def gathered_fetches() -> Pace:
    """Return the pace of fetches for which no task waits."""
    return Pace(0.1)


def gathered_records() -> Pace:
    """Return the pace of producing records for which no task waits: they are gathered at a low rate too."""
    return Pace(0.05, idle=20.0, busy=60.0)
