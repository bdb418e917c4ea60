"""How much may wait to be recorded. On the event loop; nothing here blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.api.errors import overloaded

__all__ = ["Room"]


class Room:
    """Room for some `most` Creates and `most_bytes` of theirs; who comes while any is left is let in."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._waiting = self._bytes = 0

    @contextmanager
    def hold(self, count: int, size: int) -> Iterator[None]:
        """Hold room for so many Creates of so many bytes in all. Raises Problem: RESOURCE_EXHAUSTED."""
        if self._bytes > self._most_bytes:
            raise overloaded()
        with self.add(count):
            self._bytes += size
            try:
                yield
            finally:
                self._bytes -= size

    @contextmanager
    def add(self, count: int) -> Iterator[None]:
        """The same for Creates whose bytes have their room already."""
        if self._waiting >= self._most:
            raise overloaded()
        self._waiting += count
        try:
            yield
        finally:
            self._waiting -= count
