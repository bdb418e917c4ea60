"""Counts the records in flight and their bytes, and says when the poller must stop fetching."""

from __future__ import annotations

__all__ = ["InFlightLimit"]


class InFlightLimit:
    """The limit of what a stage holds in memory.

    It is reached at `records` or `bytes_`, and stays reached until both are down to half. A pause
    discards what the client has prefetched, so pauses must be rare. Pure.
    """

    __slots__ = ("_max_bytes", "_max_records", "_reached", "bytes", "records")

    def __init__(self, records: int, bytes_: int) -> None:
        self._max_records, self._max_bytes = records, bytes_
        self._reached = False
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

    def reached(self) -> bool:
        """Return whether the poller must not fetch now."""
        if self._reached:
            self._reached = self.over_half()
        else:
            self._reached = self.records >= self._max_records or self.bytes >= self._max_bytes
        return self._reached

    def over_half(self) -> bool:
        """Return whether more than half of the records or of the bytes is in use."""
        return self.records * 2 > self._max_records or self.bytes * 2 > self._max_bytes

    def capacity(self, most: int) -> int:
        """Return how many records may be fetched now, at most `most` and at least 1."""
        return max(1, min(most, self._max_records - self.records))
