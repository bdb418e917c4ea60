"""Brings released records from the event loop to the poller's thread, and wakes that thread if it waits."""

from __future__ import annotations

import threading
from collections import deque

from services.common.stage.in_flight_record import InFlightRecord

__all__ = ["ReleaseQueue"]


class ReleaseQueue:
    """A queue that any thread fills, and one thread empties and waits on. True while it has records."""

    def __init__(self) -> None:
        self._batches: deque[list[InFlightRecord]] = deque()
        self._wake = threading.Event()
        self._waiting = False

    def __bool__(self) -> bool:
        return bool(self._batches)

    def put(self, records: list[InFlightRecord]) -> None:
        """Add records. Does not block."""
        self._batches.append(records)
        if self._waiting:
            self._wake.set()

    def wake(self) -> None:
        """End the present wait, or the next one. Does not block."""
        self._wake.set()

    def take(self) -> list[InFlightRecord]:
        """Remove all records and return them. Does not block."""
        records: list[InFlightRecord] = []
        while self._batches:
            records += self._batches.popleft()
        return records

    def wait(self, seconds: float) -> None:
        """Wait until there are records, for `seconds` at most."""
        self._waiting = True
        # A record that was put before this line did not wake anybody.
        if not self._batches:
            self._wake.wait(seconds)
        self._waiting = False
        self._wake.clear()
