"""The headers of delayed and dead records.

Both carry the original's key, value and headers (CloudEvents' `ce_*`, `traceparent`) and on top:

- `origin`   topic/partition/offset of the event record that it came from at first (bare topic name)
- `attempt`  the attempt that comes next (delayed) or was made (dead), from 1
- `cause`    why, text
- `due-at`   delayed only: not to be handled before, Unix milliseconds

A dead letter that does not fit goes without its value, or without its key and headers too. It then has
`value-size` (bytes) and `value-sha256` (hexadecimal), and `key-size` and `key-sha256`.

A marker on a dead-letter topic says in RESOLVES which records before it in its partition are done with, and
in RESOLUTION what became of them (services/cli/dead). A record that a replay produced names it in REPLAY_ID.

Any producer may write these names. The runtime carries none of them on unless Postroad itself wrote it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Protocol

from services.common.kafka.topic_partition import RecordLocation

__all__ = [
    "REPLAY_ID",
    "RESOLUTION",
    "RESOLVES",
    "Headers",
    "LeftOut",
    "Malformed",
    "Return",
    "dead",
    "delayed",
    "left_out",
    "number",
    "original",
    "parse_attempt",
    "parse_origin",
    "parse_return",
    "read_headers",
    "readable_headers",
    "traceparent",
]

Headers = list[tuple[str, bytes]]

RESOLVES = "resolves"
RESOLUTION = "resolution"
REPLAY_ID = "replay-id"

_OWN = frozenset({"due-at", "attempt", "origin", "cause", RESOLVES, RESOLUTION}).union(
    f"{part}-{what}" for part in ("value", "key") for what in ("size", "sha256")
)
_MAX_CAUSE = 2000
# Kafka takes no longer names of topics.
_MAX_TOPIC = 249
_MAX_NUMBER = (1 << 63) - 1
_asked = methodcaller("headers")


class Malformed(ValueError):
    """A record whose headers are not ours, or none at all; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Return:
    """What a delayed record's headers say."""

    due_at_ms: int
    attempt: int
    origin: RecordLocation


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A part of a dead record, `value` or `key`, that its letter does not carry: bytes and their SHA-256."""

    part: str
    size: int
    sha256: str

    @classmethod
    def of(cls, part: str, content: bytes) -> LeftOut:
        """Return what a letter says of this content in its stead."""
        return cls(part, len(content), hashlib.sha256(content).hexdigest())


class _Message(Protocol):
    def headers(self) -> Any: ...


def read_headers(message: _Message) -> Headers:
    """Return a Kafka message's headers. Raises Malformed where the client cannot read them.

    Any producer may write a name that is not UTF-8. The client then has half a list in hand and an error set.
    Python tells of that where it looks at a call's result; where it has made the call faster it does not, and
    whatever is called next raises. So it is not called like any other, nor a second time.
    """
    try:
        return _asked(message) or []
    except Exception as error:
        raise Malformed(f"headers that cannot be read: {type(error).__name__}") from error


def readable_headers(message: _Message) -> Headers:
    """Return a Kafka message's headers, none where the client cannot read them."""
    try:
        return read_headers(message)
    except Malformed:
        return []


def number(text: bytes | None) -> int | None:
    """Return the number that a header gives in ASCII digits, at most an int64; None for anything else.

    `int` also takes signs, blanks and underscores, and raises ValueError for more than 4,300 digits.
    """
    if not text or not text.isdigit() or len(text) > len(str(_MAX_NUMBER)):
        return None
    value = int(text)
    return value if value <= _MAX_NUMBER else None


def traceparent(headers: Headers | None) -> bytes | None:
    """Return the W3C trace context, None where there is none."""
    for name, value in reversed(headers or ()):
        if name == "traceparent":
            return value
    return None


def delayed(
    headers: Headers | None, *, origin: RecordLocation, attempt: int, cause: str, due_at_ms: int
) -> Headers:
    """Return the headers of the record that is to come back at `due_at_ms` as `attempt`."""
    return [*_kept(headers), ("due-at", b"%d" % due_at_ms), *_ours(origin, attempt, cause)]


def dead(
    headers: Headers | None,
    *,
    origin: RecordLocation,
    attempt: int,
    cause: str,
    foreign: bool = False,
    left_out: Iterable[LeftOut] = (),
) -> Headers:
    """Return the headers of the dead letter. `foreign`: no event of ours, so no replay produced it."""
    kept = (header for header in _kept(headers) if not (foreign and header[0] == REPLAY_ID))
    said = [
        header
        for one in left_out
        for header in (
            (f"{one.part}-size", b"%d" % one.size),
            (f"{one.part}-sha256", one.sha256.encode()),
        )
    ]
    return [*kept, *_ours(origin, attempt, cause), *said]


def left_out(headers: Headers | None) -> tuple[LeftOut, ...]:
    """Return the parts that a dead letter with these headers does not carry."""
    found = dict(headers or ())
    parts = []
    for part in ("value", "key"):
        size, sha256 = number(found.get(f"{part}-size")), found.get(f"{part}-sha256")
        if size is not None and sha256:
            parts.append(LeftOut(part, size, sha256.decode("ascii", "replace")))
    return tuple(parts)


def parse_return(headers: Headers | None) -> Return:
    """Read a delayed record's headers. Raises Malformed, naming the header."""
    found = {name: value for name, value in headers or () if name in _OWN}
    origin, attempt = _origin(found), parse_attempt(headers)
    return Return(_number(found, "due-at"), attempt, origin)


def parse_attempt(headers: Headers | None) -> int:
    """Return which attempt a delayed or dead record is. Raises Malformed, naming the header."""
    attempt = _number({name: value for name, value in headers or () if name == "attempt"}, "attempt")
    if attempt < 1:
        raise Malformed(f"attempt is {attempt}")
    return attempt


def parse_origin(headers: Headers | None) -> RecordLocation:
    """Return where a delayed or dead record stood at first. Raises Malformed, naming the header."""
    return _origin({name: value for name, value in headers or () if name == "origin"})


def original(headers: Headers | None) -> Headers:
    """Return the headers that a delayed or dead record had at first."""
    return list(_kept(headers))


def _kept(headers: Headers | None) -> Iterable[tuple[str, bytes]]:
    return (header for header in headers or () if header[0] not in _OWN)


def _ours(origin: RecordLocation, attempt: int, cause: str) -> Headers:
    text = cause.encode("utf-8", "backslashreplace")[:_MAX_CAUSE]
    return [("attempt", b"%d" % attempt), ("origin", str(origin).encode()), ("cause", text)]


def _number(found: dict[str, bytes], name: str) -> int:
    value = number(found.get(name))
    if value is None:
        raise Malformed(f"{name} is not a number" if found.get(name) else f"{name} is missing")
    return value


def _origin(found: dict[str, bytes]) -> RecordLocation:
    parts = (found.get("origin") or b"").rsplit(b"/", 2)
    # A dead letter carries its origin whatever else does not fit: so the origin has a bound.
    if len(parts) == 3 and 0 < len(parts[0]) <= _MAX_TOPIC and parts[0].isascii():
        partition, offset = number(parts[1]), number(parts[2])
        if partition is not None and offset is not None:
            return RecordLocation(parts[0].decode("ascii"), partition, offset)
    raise Malformed("origin is not topic/partition/offset")
