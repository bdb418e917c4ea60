"""The headers of delayed and dead records.

Both carry the original's key, value and headers (CloudEvents' `ce_*`, `traceparent`) and on top:

- `origin`   topic/partition/offset of the event record that it came from at first (bare topic name)
- `attempt`  the attempt that comes next (delayed) or was made (dead), from 1
- `cause`    why, text
- `due-at`   delayed only: not to be handled before, Unix milliseconds

A marker on a dead-letter topic says in RESOLVES which records before it in its partition are done with, and
in RESOLUTION what became of them (services/cli/dead). A record that a replay produced names it in REPLAY_ID.

Any producer may write these names. The runtime carries none of them on unless Postroad itself wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, Protocol

__all__ = [
    "REPLAY_ID",
    "RESOLUTION",
    "RESOLVES",
    "Headers",
    "Malformed",
    "Origin",
    "Return",
    "dead",
    "delayed",
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

_OWN = frozenset({"due-at", "attempt", "origin", "cause", RESOLVES, RESOLUTION})
_MAX_CAUSE = 2000
_asked = methodcaller("headers")


class Malformed(ValueError):
    """A record whose headers are not ours, or none at all; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record stood on its event topic (bare name)."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class Return:
    """What a delayed record's headers say."""

    due_at_ms: int
    attempt: int
    origin: Origin


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


def traceparent(headers: Headers | None) -> bytes | None:
    """Return the W3C trace context, None where there is none."""
    for name, value in reversed(headers or ()):
        if name == "traceparent":
            return value
    return None


def delayed(headers: Headers | None, *, origin: Origin, attempt: int, cause: str, due_at_ms: int) -> Headers:
    """Return the headers of the record that is to come back at `due_at_ms` as `attempt`."""
    return [*_kept(headers), ("due-at", b"%d" % due_at_ms), *_ours(origin, attempt, cause)]


def dead(
    headers: Headers | None, *, origin: Origin, attempt: int, cause: str, foreign: bool = False
) -> Headers:
    """Return the headers of the dead letter. `foreign`: no event of ours, so no replay produced it."""
    kept = (header for header in _kept(headers) if not (foreign and header[0] == REPLAY_ID))
    return [*kept, *_ours(origin, attempt, cause)]


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


def parse_origin(headers: Headers | None) -> Origin:
    """Return where a delayed or dead record stood at first. Raises Malformed, naming the header."""
    return _origin({name: value for name, value in headers or () if name == "origin"})


def original(headers: Headers | None) -> Headers:
    """Return the headers that a delayed or dead record had at first."""
    return list(_kept(headers))


def _kept(headers: Headers | None) -> Iterable[tuple[str, bytes]]:
    return (header for header in headers or () if header[0] not in _OWN)


def _ours(origin: Origin, attempt: int, cause: str) -> Headers:
    text = cause.encode("utf-8", "backslashreplace")[:_MAX_CAUSE]
    return [("attempt", b"%d" % attempt), ("origin", str(origin).encode()), ("cause", text)]


def _number(found: dict[str, bytes], name: str) -> int:
    value = found.get(name)
    # int() also takes signs, blanks and underscores; a number of ours has digits alone.
    if not value or not value.isdigit() or len(value) > 18:
        raise Malformed(f"{name} is not a number" if value else f"{name} is missing")
    return int(value)


def _origin(found: dict[str, bytes]) -> Origin:
    parts = (found.get("origin") or b"").rsplit(b"/", 2)
    if len(parts) != 3 or not parts[0] or not (parts[1].isdigit() and parts[2].isdigit()):
        raise Malformed("origin is not topic/partition/offset")
    try:
        return Origin(parts[0].decode("ascii"), int(parts[1]), int(parts[2]))
    except ValueError as error:
        raise Malformed("origin is not topic/partition/offset") from error
