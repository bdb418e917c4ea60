"""Times in the forms that users write and read. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from services.cli.errors import USAGE, Failure

if TYPE_CHECKING:
    from services.common.operations.replay.records import Point

__all__ = ["format_duration", "format_time", "format_time_ms", "parse_point", "parse_time"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_RELATIVE: Final = re.compile(r"([+-])(\d{1,9}(?:\.\d+)?)([smhdw])")


def parse_time(text: str, now: datetime) -> datetime:
    """Return the time that a text names: `now`, `-2h`, `+10m`, or ISO 8601, where no zone means UTC.

    Units are s, m, h, d and w. Raises Failure.
    """
    if text == "now":
        return now
    try:
        if relative := _RELATIVE.fullmatch(text):
            sign, number, unit = relative.groups()
            return now + timedelta(seconds=float(sign + number) * _UNITS[unit])
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Failure(
            f"{text!r} is no time: write 2026-01-31T12:00:00Z, 2026-01-31, -2h or +10m", USAGE
        ) from None


def parse_point(flag: str, text: str, now: datetime) -> Point:
    """Return the point of a topic that `text` names: start, end, an offset, or what `parse_time` takes.

    Raises Failure, which names the flag.
    """
    if text in ("start", "end"):
        return cast(Literal["start", "end"], text)
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    try:
        return parse_time(text, now)
    except Failure:
        raise Failure(
            f"{flag}: {text!r} is neither start, end, an offset nor a time (2026-01-31T12:00:00Z or -2h)",
            USAGE,
        ) from None


def format_time(value: Any) -> str:
    """Return an ISO 8601 text cut to the second, empty for anything else than a text."""
    return f"{value[:19]}Z" if isinstance(value, str) and value else ""


def format_time_ms(value: Any) -> str:
    """Return an ISO 8601 text cut to the millisecond, empty for anything else than a text."""
    if not isinstance(value, str) or not value:
        return ""
    return f"{value[:19]}.{value[20:].rstrip('Z')[:3]:0<3}Z"


def format_duration(seconds: Any) -> str:
    """Return a duration in at most two units: `350ms`, `12s`, `3m20s`, `2d4h`."""
    if seconds is None:
        return ""
    sign, left = ("-", -seconds) if seconds < 0 else ("", seconds)
    if left < 1:
        return f"{sign}{round(left * 1000)}ms"
    whole = round(left)
    for unit, below in (("d", "h"), ("h", "m"), ("m", "s")):
        size, rest = _UNITS[unit], _UNITS[below]
        if whole >= size:
            more = whole % size // rest
            return f"{sign}{whole // size}{unit}" + (f"{more}{below}" if more else "")
    return f"{sign}{whole}s"
