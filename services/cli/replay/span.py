"""Where a replay begins and ends, as it is written on the command line. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, cast

from services.cli.errors import USAGE, Failure
from services.cli.times import moment

__all__ = ["Point", "parse_point"]

Point = Literal["start", "end"] | int | datetime
"""An end of each partition, an offset (in every partition) or a time (UTC)."""


def parse_point(flag: str, text: str, now: datetime) -> Point:
    """Return the point that `text` names; raises Failure. A time is anything that `times.moment` takes."""
    if text in ("start", "end"):
        return cast(Literal["start", "end"], text)
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    try:
        return moment(text, now)
    except Failure:
        raise Failure(
            f"{flag}: {text!r} is neither start, end, an offset nor a time (2026-01-31T12:00:00Z or -2h)",
            USAGE,
        ) from None
