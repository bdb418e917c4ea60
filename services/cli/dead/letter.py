"""A dead letter: where it stands, why it is there, and the record that it was. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from google.protobuf.json_format import MessageToDict

from services.common.events import DECODERS, task_id
from services.common.kafka.headers import LeftOut, left_out, parse_origin
from services.common.kafka.records import Headers, MalformedHeaders, parse_number
from services.common.kafka.topic_partition import RecordLocation

__all__ = ["Letter", "Place", "letter_of", "parse_place", "shown"]


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a letter stands: STAGE/PARTITION/OFFSET."""

    stage: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.stage}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class Letter:
    """A letter without its value, so that many fit into memory. `origin` is None where no stage wrote it.

    `at_ms`: when it was put there, Unix milliseconds; `attempt`: the one that failed, 0 where it is not said.
    `left_out`: the parts of the record that did not fit.
    """

    place: Place
    at_ms: int
    cause: str
    origin: RecordLocation | None
    attempt: int
    key: bytes | None
    left_out: tuple[LeftOut, ...] = ()

    @property
    def time(self) -> str:
        """When it was put there, ISO 8601, UTC."""
        return datetime.fromtimestamp(self.at_ms / 1000, UTC).isoformat(timespec="milliseconds")

    @property
    def task(self) -> str:
        """The task's id, empty where the key is none."""
        return str(UUID(bytes=self.key)) if self.key is not None and len(self.key) == 16 else ""


def parse_place(text: str) -> Place:
    """Return the place that `text` names; raises ValueError, saying what one is."""
    parts = text.rsplit("/", 2)
    if len(parts) != 3 or not parts[0] or not all(p.isascii() and p.isdecimal() for p in parts[1:]):
        raise ValueError(f"{text!r} is no dead letter's place, which is STAGE/PARTITION/OFFSET")
    return Place(parts[0], int(parts[1]), int(parts[2]))


def letter_of(place: Place, at_ms: int, key: bytes | None, headers: Headers | None) -> Letter:
    """Return the letter that a record is. Of headers that are no stage's what can be read is taken."""
    found = dict(headers or ())
    try:
        origin = parse_origin(headers)
    except MalformedHeaders:
        origin = None
    cause = (found.get("cause") or b"").decode("utf-8", "replace")
    tried = parse_number(found.get("attempt")) or 0
    return Letter(place, at_ms, cause, origin, tried, key, left_out(headers) if origin else ())


def shown(letter: Letter, value: bytes | None, headers: Headers | None) -> dict[str, Any]:
    """Return all that there is to a letter, of what JSON can hold.

    `event` is the value as JSON where it decodes as an event of its origin's topic, otherwise `value` is its
    text, or its bytes in hexadecimal digits after `0x`. `left_out` says what the letter does not carry.
    `size` is that of the value that the record had.
    """
    event = _event(letter, value)
    size = next((part.size for part in letter.left_out if part.part == "value"), len(value or b""))
    return {
        "letter": str(letter.place),
        "cause": letter.cause,
        "origin": str(letter.origin) if letter.origin else None,
        "attempt": letter.attempt or None,
        "time": letter.time,
        "task": letter.task or None,
        "key": _text(letter.key),
        "headers": {name: _text(content) for name, content in headers or ()},
        "size": size,
        "left_out": [asdict(part) for part in letter.left_out] or None,
        "event": event,
        "value": None if event is not None else _text(value),
    }


def _event(letter: Letter, value: bytes | None) -> dict[str, Any] | None:
    decode = DECODERS.get(letter.origin.topic) if letter.origin else None
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
