"""Conversion between the times of columns and of events.

A column holds a naive `datetime` in UTC; an event holds microseconds since the Unix epoch.
"""

from __future__ import annotations

from datetime import datetime, timedelta

__all__ = ["FROM_MICROS", "clamped", "from_micros", "to_micros"]

_EPOCH = datetime(1970, 1, 1)  # naive, as the columns are
_LAST = (datetime(9999, 12, 31, 23, 59, 59) - _EPOCH) // timedelta(microseconds=1)


FROM_MICROS = "TIMESTAMP'1970-01-01 00:00:00' + INTERVAL %s MICROSECOND"
"""SQL for a column's time, with a placeholder for its microseconds (see `clamped`) or NULL."""


def clamped(micros: int) -> int:
    """Return the microseconds since the Unix epoch that are nearest within the years 1970 to 9999."""
    return micros if 0 <= micros <= _LAST else min(max(micros, 0), _LAST)


def from_micros(micros: int) -> datetime:
    """Return microseconds since the Unix epoch as a column's time: exact, within the years 1970 to 9999."""
    # Positional (days, seconds, microseconds): that takes half the time of a keyword.
    return _EPOCH + timedelta(0, 0, clamped(micros))


def to_micros(time: datetime) -> int:
    """Return a column's time as microseconds since the Unix epoch."""
    return (time - _EPOCH) // timedelta(microseconds=1)
