"""Reads dead letters, and the records that they came from. Blocks.

Raises `confluent_kafka.KafkaException`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from confluent_kafka import Message

from services.common.config import Settings
from services.common.kafka.headers import LeftOut, readable_headers
from services.common.kafka.records import Headers
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import Names
from services.common.operations.dead_letters.dead_letter import (
    DeadLetter,
    DeadLetterLocation,
    absent_locations,
    filter_dead_letters,
    parse_dead_letter,
)
from services.common.operations.dead_letters.resolution import resolved_offsets
from services.common.operations.errors import InvalidOption, NotFound
from services.common.operations.topic_reader import TopicReader
from services.common.stages import STAGES

__all__ = [
    "DeadLetterRecord",
    "OriginLost",
    "OriginRecord",
    "UnresolvedDeadLetters",
    "find_dead_letters",
    "read_origin",
    "read_records",
    "read_unresolved",
]


class DeadLetterRecord(NamedTuple):
    """A dead letter with all that it carries."""

    dead_letter: DeadLetter
    value: bytes | None
    headers: Headers


@dataclass(slots=True)
class UnresolvedDeadLetters:
    """The unresolved dead letters by their locations. `starts` and `ends` are by stage and partition."""

    dead_letters: dict[DeadLetterLocation, DeadLetter] = field(default_factory=dict)
    starts: dict[tuple[str, int], int] = field(default_factory=dict)
    ends: dict[tuple[str, int], int] = field(default_factory=dict)


class OriginLost(Exception):
    """What a dead letter does not carry is lost at its origin too. The text says why."""


class OriginRecord(NamedTuple):
    """The record at a dead letter's origin."""

    key: bytes | None
    value: bytes | None
    headers: Headers


def find_dead_letters(
    settings: Settings,
    locations: Collection[DeadLetterLocation] = (),
    stage: str | None = None,
    cause: str = "",
) -> list[DeadLetter]:
    """Return the unresolved dead letters at these locations, of this stage and with this text in their cause.

    Without locations or stage, those of all. Raises InvalidOption where there is no such stage, and NotFound
    where a location has no dead letter.
    """
    stages = {one.stage for one in locations} if locations else {stage} if stage else set(STAGES)
    unknown = (stages | ({stage} if stage else set())) - set(STAGES)
    if unknown:
        raise InvalidOption("stage", f"no stage {sorted(unknown)[0]!r}; there are {', '.join(STAGES)}")
    unresolved = read_unresolved(settings, sorted(stages)).dead_letters.values()
    found = filter_dead_letters(unresolved, locations, cause)
    if absent := absent_locations(found, locations):
        raise NotFound(f"no dead letter {', '.join(map(str, absent))}")
    return [one for one in found if stage is None or one.location.stage == stage]


def read_unresolved(settings: Settings, stages: Iterable[str] = STAGES) -> UnresolvedDeadLetters:
    """Read the dead-letter topics of these stages from start to end."""
    found = UnresolvedDeadLetters()
    topics, stage_of = _open(settings, stages)
    try:
        found.starts = {(stage_of[at.topic], at.partition): offset for at, offset in topics.start.items()}
        ends = topics.ends()
        found.ends = {(stage_of[at.topic], at.partition): offset for at, offset in ends.items()}
        for messages in topics.read(ends, 1000):
            for message in messages:
                _add(found, stage_of[message.topic() or ""], message)
    finally:
        topics.close()
    return found


def read_records(settings: Settings, locations: Sequence[DeadLetterLocation]) -> Iterator[DeadLetterRecord]:
    """Yield the dead letters at these locations with their values, in each partition's order.

    Those that are deleted meanwhile are left out. The records between them are read too.
    """
    wanted: dict[tuple[str, int], set[int]] = {}
    for location in locations:
        wanted.setdefault((location.stage, location.partition), set()).add(location.offset)
    topics, stage_of = _open(settings, sorted({location.stage for location in locations}))
    try:
        ends: dict[TopicPartition, int] = {}
        for partition in topics.next:
            offsets = wanted.get((stage_of[partition.topic], partition.partition))
            if offsets:
                topics.next[partition] = max(topics.start[partition], min(offsets))
                ends[partition] = max(offsets) + 1
        present = topics.ends()
        for messages in topics.read({at: min(end, present[at]) for at, end in ends.items()}, 100):
            for message in messages:
                stage, number = stage_of[message.topic() or ""], message.partition() or 0
                headers = readable_headers(message)
                if message.offset() in wanted[stage, number] and _resolved(message, headers) is None:
                    yield DeadLetterRecord(_dead_letter(stage, message, headers), message.value(), headers)
    finally:
        topics.close()


def read_origin(settings: Settings, dead_letter: DeadLetter) -> OriginRecord:
    """Return the record at a dead letter's origin, which must be known. Raises OriginLost."""
    origin = dead_letter.origin
    assert origin is not None
    name = Names(settings.topic_prefix).topic(origin.topic)
    topics = TopicReader(settings, [name])
    try:
        partition = TopicPartition(name, origin.partition)
        start, end = topics.start.get(partition, 0), topics.ends().get(partition, 0)
        if start <= origin.offset < end:
            topics.next[partition] = origin.offset
            for messages in topics.read({partition: origin.offset + 1}, 1):
                for message in messages:
                    found = OriginRecord(message.key(), message.value(), readable_headers(message))
                    if message.offset() == origin.offset:
                        return _checked(dead_letter, found)
    finally:
        topics.close()
    raise OriginLost(
        f"{dead_letter.location} has no {_lacking_parts(dead_letter)}, and {origin} is no longer on its topic"
    )


def _open(settings: Settings, stages: Iterable[str]) -> tuple[TopicReader, dict[str, str]]:
    """Return a reader of the stages' dead-letter topics, and each topic's stage by its full name."""
    names = Names(settings.topic_prefix)
    stage_of = {names.dead(stage): stage for stage in stages}
    return TopicReader(settings, list(stage_of)), stage_of


def _add(found: UnresolvedDeadLetters, stage: str, message: Message) -> None:
    headers = readable_headers(message)
    resolved = _resolved(message, headers)
    if resolved is None:
        dead_letter = _dead_letter(stage, message, headers)
        found.dead_letters[dead_letter.location] = dead_letter
        return
    partition = message.partition() or 0
    for offsets in resolved:
        # The offsets before the partition's start are deleted.
        start = found.starts.get((stage, partition), 0)
        for offset in range(max(offsets.start, start), offsets.stop):
            found.dead_letters.pop(DeadLetterLocation(stage, partition, offset), None)


def _resolved(message: Message, headers: Headers) -> list[range] | None:
    return resolved_offsets(message.offset() or 0, message.key(), message.value(), headers)


def _dead_letter(stage: str, message: Message, headers: Headers) -> DeadLetter:
    location = DeadLetterLocation(stage, message.partition() or 0, message.offset() or 0)
    return parse_dead_letter(location, message.timestamp()[1], message.key(), headers)


def _checked(dead_letter: DeadLetter, found: OriginRecord) -> OriginRecord:
    contents = {"value": found.value or b"", "key": found.key or b""}
    for part in dead_letter.left_out:
        if LeftOut.of(part.part, contents[part.part]) != part:
            raise OriginLost(
                f"{dead_letter.location} has no {_lacking_parts(dead_letter)},"
                f" and {dead_letter.origin} is another record"
            )
    return found


def _lacking_parts(dead_letter: DeadLetter) -> str:
    return " and ".join(part.part for part in dead_letter.left_out)
