"""A dead letter: its location, its cause, and the record that it was. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from google.protobuf.json_format import MessageToDict

from services.common.events import DECODERS, task_id
from services.common.kafka.headers import LeftOut, left_out, parse_origin
from services.common.kafka.records import Headers, MalformedHeaders, parse_number
from services.common.kafka.topic_partition import RecordLocation

__all__ = [
    "DeadLetter",
    "DeadLetterLocation",
    "absent_locations",
    "describe",
    "filter_dead_letters",
    "group_by_cause",
    "parse_dead_letter",
    "parse_location",
]


@dataclass(frozen=True, slots=True, order=True)
class DeadLetterLocation:
    """Where a dead letter is: on its stage's dead-letter topic. Its text is STAGE/PARTITION/OFFSET."""

    stage: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.stage}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter without its value, so that many fit into memory.

    `at_ms` is when its stage gave up the record, Unix milliseconds. `origin` is where the record was first,
    None where no stage wrote the dead letter. `attempt` is the one that failed, 0 where no header names it.
    `left_out` are the parts of the record that did not fit.
    """

    location: DeadLetterLocation
    at_ms: int
    cause: str
    origin: RecordLocation | None
    attempt: int
    key: bytes | None
    left_out: tuple[LeftOut, ...] = ()

    @property
    def time(self) -> str:
        """When its stage gave up the record, ISO 8601 in UTC."""
        return datetime.fromtimestamp(self.at_ms / 1000, UTC).isoformat(timespec="milliseconds")

    @property
    def task(self) -> str:
        """The task's id, empty where the key is no id."""
        return str(UUID(bytes=self.key)) if self.key is not None and len(self.key) == 16 else ""

    def summary(self) -> dict[str, Any]:
        """Return what a list shows of it, as JSON can hold it."""
        return {
            "letter": str(self.location),
            "time": self.time,
            "origin": str(self.origin) if self.origin else None,
            "attempt": self.attempt or None,
            "task": self.task or None,
            "cause": self.cause,
        }


def parse_location(text: str) -> DeadLetterLocation:
    """Return the location that `text` names. Raises ValueError."""
    parts = text.rsplit("/", 2)
    if len(parts) != 3 or not parts[0] or not all(p.isascii() and p.isdecimal() for p in parts[1:]):
        raise ValueError(f"{text!r} is no dead letter's location, which is STAGE/PARTITION/OFFSET")
    return DeadLetterLocation(parts[0], int(parts[1]), int(parts[2]))


def parse_dead_letter(
    location: DeadLetterLocation, at_ms: int, key: bytes | None, headers: Headers | None
) -> DeadLetter:
    """Return the dead letter that a record is. Headers that no stage wrote are read as far as possible."""
    found = dict(headers or ())
    try:
        origin = parse_origin(headers)
    except MalformedHeaders:
        origin = None
    cause = (found.get("cause") or b"").decode("utf-8", "replace")
    attempt = parse_number(found.get("attempt")) or 0
    return DeadLetter(location, at_ms, cause, origin, attempt, key, left_out(headers) if origin else ())


def filter_dead_letters(
    dead_letters: Iterable[DeadLetter], locations: Collection[DeadLetterLocation], cause: str
) -> list[DeadLetter]:
    """Return the dead letters at these locations whose cause contains `cause`, in the order of locations.

    Without locations, all dead letters of that cause.
    """
    at_locations = (one for one in dead_letters if not locations or one.location in locations)
    return sorted((one for one in at_locations if cause in one.cause), key=lambda one: one.location)


def absent_locations(
    dead_letters: Iterable[DeadLetter], locations: Collection[DeadLetterLocation]
) -> list[DeadLetterLocation]:
    """Return the locations that none of these dead letters has."""
    present = {one.location for one in dead_letters}
    return sorted(location for location in locations if location not in present)


def group_by_cause(dead_letters: Iterable[DeadLetter]) -> list[dict[str, Any]]:
    """Return a row for each stage and cause, ordered by stage and then by falling number of dead letters."""
    found: dict[tuple[str, str], list[DeadLetter]] = {}
    for one in dead_letters:
        found.setdefault((one.location.stage, one.cause), []).append(one)
    rows: list[dict[str, Any]] = []
    for (stage, cause), group in found.items():
        first, last = (bound(group, key=lambda one: (one.at_ms, one.location)) for bound in (min, max))
        rows.append(
            {
                "stage": stage,
                "count": len(group),
                "first": first.time,
                "last": last.time,
                "sample": str(last.location),
                "cause": cause,
                "origins": sorted({one.origin.topic for one in group if one.origin is not None}),
            }
        )
    return sorted(rows, key=lambda row: (row["stage"], -row["count"], row["cause"]))


def describe(dead_letter: DeadLetter, value: bytes | None, headers: Headers | None) -> dict[str, Any]:
    """Return everything about a dead letter, as JSON can hold it.

    `event` is the value as JSON where it decodes as an event of its origin's topic. Otherwise `value` is its
    text, or its bytes in hexadecimal digits after `0x`. `left_out` names the parts that the dead letter does
    not carry. `size` is the size of the record's value.
    """
    event = _event(dead_letter, value)
    size = next((part.size for part in dead_letter.left_out if part.part == "value"), len(value or b""))
    return {
        "letter": str(dead_letter.location),
        "cause": dead_letter.cause,
        "origin": str(dead_letter.origin) if dead_letter.origin else None,
        "attempt": dead_letter.attempt or None,
        "time": dead_letter.time,
        "task": dead_letter.task or None,
        "key": _text(dead_letter.key),
        "headers": {name: _text(content) for name, content in headers or ()},
        "size": size,
        "left_out": [asdict(part) for part in dead_letter.left_out] or None,
        "event": event,
        "value": None if event is not None else _text(value),
    }


def _event(dead_letter: DeadLetter, value: bytes | None) -> dict[str, Any] | None:
    decode = DECODERS.get(dead_letter.origin.topic) if dead_letter.origin else None
    if decode is None:
        return None
    try:
        event = decode(value)
        fields: dict[str, Any] = MessageToDict(event, preserving_proto_field_name=True)
    except ValueError:
        return None
    fields.get("task", fields)["id"] = str(UUID(bytes=task_id(event)))
    return {"type": event.DESCRIPTOR.full_name, **fields}


def _text(content: bytes | None) -> str | None:
    if content is None:
        return None
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "0x" + content.hex()
    return text if text.isprintable() or not text else json.dumps(text, ensure_ascii=False)[1:-1]
