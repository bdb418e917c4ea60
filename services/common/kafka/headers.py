"""Reads headers, and writes those of delayed records, dead letters, their resolutions and replayed records.

A delayed record and a dead letter keep the original record's key, value and headers (`traceparent`, and the
`ce_*` of services/common/events.py) and add:

- `origin`   topic/partition/offset of the event record that it was at first (bare topic name)
- `attempt`  the attempt that comes next (delayed record) or that failed (dead letter), from 1
- `cause`    why, text
- `due-at`   delayed records only: Unix milliseconds from which the stage handles it. If the reader's clock
             differs, the stage handles it once it has known it for the delay and a tenth.

A dead letter that is too large goes without its value, or without its key and headers too. It then has
`value-size` (bytes) and `value-sha256` (hexadecimal), and `key-size` and `key-sha256`.

A dead-letter resolution says in RESOLVES which dead letters before it in its partition are done.
RESOLUTION says what became of them. A record that a replay produced names that replay in REPLAY_ID.

Any producer may write headers of these names. The runtime drops them unless Postroad itself wrote them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Protocol

from services.common.kafka.records import Headers, MalformedHeaders, parse_number
from services.common.kafka.topic_partition import RecordLocation

__all__ = [
    "REPLAY_ID",
    "RESOLUTION",
    "RESOLVES",
    "DelayedHeaders",
    "LeftOut",
    "dead_letter_headers",
    "delayed_headers",
    "left_out",
    "original_headers",
    "parse_attempt",
    "parse_delayed_headers",
    "parse_origin",
    "read_headers",
    "readable_headers",
]

RESOLVES = "resolves"
RESOLUTION = "resolution"
REPLAY_ID = "replay-id"

_OWN = frozenset({"due-at", "attempt", "origin", "cause", RESOLVES, RESOLUTION}).union(
    f"{part}-{what}" for part in ("value", "key") for what in ("size", "sha256")
)
_MAX_CAUSE = 2000
# The longest topic name that Kafka takes.
_MAX_TOPIC = 249
_call_headers = methodcaller("headers")


@dataclass(frozen=True, slots=True)
class DelayedHeaders:
    """What the headers of a delayed record say: when it is due, its next attempt, and its origin."""

    due_at_ms: int
    attempt: int
    origin: RecordLocation


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A part of a record, `value` or `key`, that its dead letter leaves out: its bytes and their SHA-256."""

    part: str
    size: int
    sha256: str

    @classmethod
    def of(cls, part: str, content: bytes) -> LeftOut:
        """Return what stands in the place of this content."""
        return cls(part, len(content), hashlib.sha256(content).hexdigest())


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


def delayed_headers(
    headers: Headers | None, *, origin: RecordLocation, attempt: int, cause: str, due_at_ms: int
) -> Headers:
    """Return the headers of a record that comes back at `due_at_ms` (Unix milliseconds) as `attempt`."""
    return [*_kept(headers), ("due-at", b"%d" % due_at_ms), *_ours(origin, attempt, cause)]


def dead_letter_headers(
    headers: Headers | None,
    *,
    origin: RecordLocation,
    attempt: int,
    cause: str,
    foreign: bool = False,
    left_out: Iterable[LeftOut] = (),
) -> Headers:
    """Return the headers of a dead letter. A `foreign` record is no event, so no replay produced it."""
    kept = (header for header in _kept(headers) if not (foreign and header[0] == REPLAY_ID))
    left_out_headers = [
        header
        for one in left_out
        for header in (
            (f"{one.part}-size", b"%d" % one.size),
            (f"{one.part}-sha256", one.sha256.encode()),
        )
    ]
    return [*kept, *_ours(origin, attempt, cause), *left_out_headers]


def left_out(headers: Headers | None) -> tuple[LeftOut, ...]:
    """Return the parts that a dead letter with these headers leaves out."""
    found = dict(headers or ())
    parts = []
    for part in ("value", "key"):
        size, sha256 = parse_number(found.get(f"{part}-size")), found.get(f"{part}-sha256")
        if size is not None and sha256:
            parts.append(LeftOut(part, size, sha256.decode("ascii", "replace")))
    return tuple(parts)


def parse_delayed_headers(headers: Headers | None) -> DelayedHeaders:
    """Read the headers of a delayed record. Raises MalformedHeaders, with the header's name."""
    found = {name: value for name, value in headers or () if name in _OWN}
    origin, attempt = _origin(found), parse_attempt(headers)
    return DelayedHeaders(_number(found, "due-at"), attempt, origin)


def parse_attempt(headers: Headers | None) -> int:
    """Return the attempt that the record is. Raises MalformedHeaders with the header's name."""
    attempt = _number({name: value for name, value in headers or () if name == "attempt"}, "attempt")
    if attempt < 1:
        raise MalformedHeaders(f"attempt is {attempt}")
    return attempt


def parse_origin(headers: Headers | None) -> RecordLocation:
    """Return where the record was at first. Raises MalformedHeaders, with the header's name."""
    return _origin({name: value for name, value in headers or () if name == "origin"})


def original_headers(headers: Headers | None) -> Headers:
    """Return the headers that the record had at first."""
    return list(_kept(headers))


def _kept(headers: Headers | None) -> Iterable[tuple[str, bytes]]:
    return (header for header in headers or () if header[0] not in _OWN)


def _ours(origin: RecordLocation, attempt: int, cause: str) -> Headers:
    text = cause.encode("utf-8", "backslashreplace")[:_MAX_CAUSE]
    return [("attempt", b"%d" % attempt), ("origin", str(origin).encode()), ("cause", text)]


def _number(found: dict[str, bytes], name: str) -> int:
    value = parse_number(found.get(name))
    if value is None:
        raise MalformedHeaders(f"{name} is not a number" if found.get(name) else f"{name} is missing")
    return value


def _origin(found: dict[str, bytes]) -> RecordLocation:
    parts = (found.get("origin") or b"").rsplit(b"/", 2)
    # A dead letter keeps its origin whatever else it leaves out, so the origin must be bounded.
    if len(parts) == 3 and 0 < len(parts[0]) <= _MAX_TOPIC and parts[0].isascii():
        partition, offset = parse_number(parts[1]), parse_number(parts[2])
        if partition is not None and offset is not None:
            return RecordLocation(parts[0].decode("ascii"), partition, offset)
    raise MalformedHeaders("origin is not topic/partition/offset")
