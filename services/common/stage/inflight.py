"""The bound on what a stage holds in memory."""

from __future__ import annotations

__all__ = ["InFlight"]


class InFlight:
    """Counts what was fetched and not given back, and says when to stop fetching.

    Full once `records` or `bytes_` is reached; no longer full once both are down to half. The gap is
    there because a pause throws away what was prefetched: pausing must be rare. Pure.
    """

    __slots__ = ("_full", "_max_bytes", "_max_records", "bytes", "records")

    def __init__(self, records: int, bytes_: int) -> None:
        self._max_records, self._max_bytes = records, bytes_
        self._full = False
        self.records = 0
        self.bytes = 0

    def add(self, size: int) -> None:
        """Count one record of `size` bytes in."""
        self.records += 1
        self.bytes += size

    def remove(self, size: int) -> None:
        """Count one record of `size` bytes out."""
        self.records -= 1
        self.bytes -= size

    def full(self) -> bool:
        """Return whether fetching must rest now."""
        if self._full:
            self._full = self.over_half()
        else:
            self._full = self.records >= self._max_records or self.bytes >= self._max_bytes
        return self._full

    def over_half(self) -> bool:
        """Return whether more is held than lets fetching go on after a rest."""
        return self.records * 2 > self._max_records or self.bytes * 2 > self._max_bytes

    def room(self, most: int) -> int:
        """Return how many records may be fetched now, at most `most` and at least 1."""
        return max(1, min(most, self._max_records - self.records))
