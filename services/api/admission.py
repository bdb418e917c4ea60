"""Admission control: how many Creates, and how many of their bytes, may wait for the database."""

from __future__ import annotations

from types import TracebackType

from services.api.errors import overloaded

__all__ = ["Admission", "AdmissionControl"]


class AdmissionControl:
    """Refuses calls while `max_count` Creates or `max_bytes` bytes wait. For one event loop; never blocks.

    A call that arrives below a limit is admitted whole, so the last one may exceed the limit.
    """

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count, self._max_bytes = max_count, max_bytes
        self.count = self.bytes = 0

    def admit(self, count: int, size: int) -> Admission:
        """Return a block in which `count` Creates of `size` bytes in all count as waiting.

        Raises StatusError RESOURCE_EXHAUSTED at a limit.
        """
        if self.bytes > self._max_bytes:
            raise overloaded()
        return self.admit_count(count, size)

    def admit_count(self, count: int, size: int = 0) -> Admission:
        """Do the same for Creates whose bytes `admit` has already counted."""
        if self.count >= self._max_count:
            raise overloaded()
        return Admission(self, count, size)


class Admission:
    """A `with` block in which a call counts as waiting. Each call of the api enters one or two."""

    __slots__ = ("_control", "_count", "_size")

    def __init__(self, control: AdmissionControl, count: int, size: int) -> None:
        self._control, self._count, self._size = control, count, size

    def __enter__(self) -> None:
        self._control.count += self._count
        self._control.bytes += self._size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.count -= self._count
        self._control.bytes -= self._size
