"""What Kafka clients read and write: a record to be produced, and the headers of one that was fetched."""

from __future__ import annotations

from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Protocol

__all__ = [
    "Headers",
    "MalformedHeaders",
    "OutgoingRecord",
    "parse_number",
    "read_headers",
    "readable_headers",
    "traceparent",
]

Headers = list[tuple[str, bytes]]

_MAX_NUMBER = (1 << 63) - 1
_call_headers = methodcaller("headers")


@dataclass(frozen=True, slots=True)
class OutgoingRecord:
    """A record to be produced. `topic` is a bare name (topics.py); the publisher adds the prefix."""

    topic: str
    key: bytes
    value: bytes
    headers: Headers


class MalformedHeaders(ValueError):
    """Headers that cannot be read, or that Postroad did not write so; the text says what is wrong."""


class _Message(Protocol):
    def headers(self) -> Any: ...


def read_headers(message: _Message) -> Headers:
    """Return the headers of a fetched message. Raises MalformedHeaders where the client cannot read them.

    Any producer may write a header name that is not UTF-8. confluent_kafka then returns half a list and
    leaves an exception set. Python raises it at once only where it checks the call's result. A
    specialized call does not, and the exception appears at the next call. A `methodcaller` is never
    specialized.
    """
    try:
        return _call_headers(message) or []
    except Exception as error:
        raise MalformedHeaders(f"headers that cannot be read: {type(error).__name__}") from error


def readable_headers(message: _Message) -> Headers:
    """Return the headers of a fetched message, an empty list where the client cannot read them."""
    try:
        return read_headers(message)
    except MalformedHeaders:
        return []


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
