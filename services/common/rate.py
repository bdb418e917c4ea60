"""A bounded rate: the generic cell rate algorithm (ITU-T I.371, annex A). Pure: the caller has the clock."""

from __future__ import annotations

__all__ = ["Rate"]


class Rate:
    """Allows `rate` events a second, and `burst` of them at once after a pause. ValueError: the rate is 0."""

    __slots__ = ("_burst", "_due", "_gap")

    def __init__(self, rate: float, burst: float = 1) -> None:
        if rate <= 0:
            raise ValueError(f"a rate of {rate:g} a second would never end")
        self._gap = 1 / rate
        self._burst = self._gap * (max(1, burst) - 1)
        # When the next event would be due if all had come evenly.
        self._due = float("-inf")

    def wait(self, now: float) -> float:
        """Return the seconds until the next event may happen; 0: now."""
        return max(0.0, self._due - self._burst - now)

    def took(self, now: float) -> None:
        """Count an event that happened at `now`, after its wait."""
        self._due = max(now, self._due) + self._gap

    def undo(self) -> None:
        """Uncount one event that did not happen after all."""
        self._due -= self._gap

    def is_idle(self, now: float) -> bool:
        """Return whether a new Rate would give the same answers."""
        return self._due <= now
