"""Admission control: how many Creates, and how many of their bytes, may wait for the database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.api.errors import overloaded

__all__ = ["AdmissionControl"]


class AdmissionControl:
    """Refuses calls while `max_count` Creates or `max_bytes` bytes wait. For one event loop; never blocks.

    A call that arrives below a limit is admitted whole, so the last one may exceed the limit.
    """

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count, self._max_bytes = max_count, max_bytes
        self._count = self._bytes = 0

    @contextmanager
    def admit(self, count: int, size: int) -> Iterator[None]:
        """Count `count` Creates of `size` bytes in all as waiting, inside the `with` block.

        Raises StatusError RESOURCE_EXHAUSTED at a limit.
        """
        if self._bytes > self._max_bytes:
            raise overloaded()
        with self.admit_count(count):
            self._bytes += size
            try:
                yield
            finally:
                self._bytes -= size

    @contextmanager
    def admit_count(self, count: int) -> Iterator[None]:
        """Do the same for Creates whose bytes `admit` has already counted."""
        if self._count >= self._max_count:
            raise overloaded()
        self._count += count
        try:
            yield
        finally:
            self._count -= count
