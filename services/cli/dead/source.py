"""The record that a dead letter came from, where the letter does not carry all of it. Blocks.

Raises `confluent_kafka.KafkaException`.
"""

from __future__ import annotations

from typing import NamedTuple

from services.cli.dead.letter import Letter
from services.cli.topic_log import At, Log
from services.common.config import Settings
from services.common.kafka.headers import LeftOut
from services.common.kafka.records import Headers, readable_headers
from services.common.kafka.topics import Names

__all__ = ["Gone", "Source", "source"]


class Gone(Exception):
    """What the letter does not carry cannot be had any more; the text says why."""


class Source(NamedTuple):
    """A record as it stands at a letter's origin."""

    key: bytes | None
    value: bytes | None
    headers: Headers


def source(settings: Settings, letter: Letter) -> Source:
    """Return the record at the origin of a `replayable` letter. Raises Gone."""
    origin = letter.origin
    assert origin is not None
    name = Names(settings.topic_prefix).topic(origin.topic)
    log = Log(settings, [name])
    try:
        at = At(name, origin.partition)
        start, end = log.start.get(at, 0), log.ends().get(at, 0)
        if start <= origin.offset < end:
            log.next[at] = origin.offset
            for messages in log.read({at: origin.offset + 1}, 1):
                for message in messages:
                    found = Source(message.key(), message.value(), readable_headers(message))
                    if message.offset() == origin.offset:
                        return _checked(letter, found)
    finally:
        log.close()
    raise Gone(f"{letter.place} has no {_parts(letter)}, and {origin} is no longer on its topic")


def _checked(letter: Letter, found: Source) -> Source:
    contents = {"value": found.value or b"", "key": found.key or b""}
    for part in letter.left_out:
        if LeftOut.of(part.part, contents[part.part]) != part:
            raise Gone(f"{letter.place} has no {_parts(letter)}, and {letter.origin} is another record")
    return found


def _parts(letter: Letter) -> str:
    return " and ".join(part.part for part in letter.left_out)
