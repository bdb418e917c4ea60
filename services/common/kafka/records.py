"""A record to be produced, and what its headers and those of a fetched one are made of."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "Headers",
    "MalformedHeaders",
    "OutgoingRecord",
    "parse_number",
    "traceparent",
]

Headers = list[tuple[str, bytes]]

_MAX_NUMBER = (1 << 63) - 1


class OutgoingRecord(NamedTuple):
    """A record to be produced. `topic` is a bare name (topics.py); the publisher adds the prefix."""

    topic: str
    key: bytes
    value: bytes
    headers: Headers


class MalformedHeaders(ValueError):
    """Headers that cannot be read, or that Postroad did not write so; the text says what is wrong."""


def parse_number(text: bytes | None) -> int | None:
    """Return the number that a header gives in ASCII digits, at most an int64; None for anything else.

    `int` alone also takes signs, blanks and underscores, and raises ValueError for more than 4,300 digits.
    """
    if not text or not text.isdigit() or len(text) > len(str(_MAX_NUMBER)):
        return None
    value = int(text)
    return value if value <= _MAX_NUMBER else None


def traceparent(headers: Headers | None) -> bytes | None:
    """Return the W3C trace context, None where there is none. The last header of that name counts."""
    for name, value in reversed(headers or ()):
        if name == "traceparent":
            return value
    return None
