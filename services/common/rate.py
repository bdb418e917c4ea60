"""A bounded rate: the generic cell rate algorithm (ITU-T I.371, annex A). Pure: the clock is the caller's."""

from __future__ import annotations

__all__ = ["Rate"]


class Rate:
    """At most `rate` a second, `burst` of them at once after a rest. Raises ValueError for a rate of 0."""

    __slots__ = ("_due", "_gap", "_rest")

    def __init__(self, rate: float, burst: float = 1) -> None:
        if rate <= 0:
            raise ValueError(f"a rate of {rate:g} a second would never end")
        self._gap = 1 / rate
        self._rest = self._gap * (max(1, burst) - 1)
        # When the next one would be due, had all been taken evenly.
        self._due = float("-inf")

    def wait(self, now: float) -> float:
        """Return in how many seconds the next one may go; 0: now."""
        return max(0.0, self._due - self._rest - now)

    def took(self, now: float) -> None:
        """Count one that went at `now`, after its wait."""
        self._due = max(now, self._due) + self._gap

    def undo(self) -> None:
        """Count one less: it did not go."""
        self._due -= self._gap

    def is_idle(self, now: float) -> bool:
        """Return whether it has forgotten all that went: a new one would say the same."""
        return self._due <= now
