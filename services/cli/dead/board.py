"""The dead-letter topics, read. Blocks; raises `confluent_kafka.KafkaException`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from confluent_kafka import Message

from services.cli.dead import marker
from services.cli.dead.letter import Letter, Place, letter_of
from services.cli.topic_log import At, Log
from services.common.config import Settings
from services.common.kafka.records import Headers, readable_headers
from services.common.kafka.topics import Names
from services.common.stages import STAGES

__all__ = ["Board", "Record", "read_board", "records"]


class Record(NamedTuple):
    """A letter with all that it carries."""

    letter: Letter
    value: bytes | None
    headers: Headers


@dataclass(slots=True)
class Board:
    """The letters that are not resolved, by their place, and where each stage's partitions begin and end."""

    letters: dict[Place, Letter] = field(default_factory=dict)
    starts: dict[tuple[str, int], int] = field(default_factory=dict)
    ends: dict[tuple[str, int], int] = field(default_factory=dict)


def read_board(settings: Settings, stages: Iterable[str] = STAGES) -> Board:
    """Read the dead-letter topics of these stages from start to end."""
    board = Board()
    log, names = _open(settings, stages)
    try:
        board.starts = {(names[at.topic], at.partition): offset for at, offset in log.start.items()}
        ends = log.ends()
        board.ends = {(names[at.topic], at.partition): offset for at, offset in ends.items()}
        for messages in log.read(ends, 1000):
            for message in messages:
                _put(board, names[message.topic() or ""], message)
    finally:
        log.close()
    return board


def records(settings: Settings, places: Sequence[Place]) -> Iterator[Record]:
    """Yield the letters at these places with their values, each partition in order; those that are gone not.

    What lies between them is read too.
    """
    wanted: dict[tuple[str, int], set[int]] = {}
    for place in places:
        wanted.setdefault((place.stage, place.partition), set()).add(place.offset)
    log, names = _open(settings, sorted({place.stage for place in places}))
    try:
        ends: dict[At, int] = {}
        for at in log.next:
            offsets = wanted.get((names[at.topic], at.partition))
            if offsets:
                log.next[at] = max(log.start[at], min(offsets))
                ends[at] = max(offsets) + 1
        present = log.ends()
        for messages in log.read({at: min(end, present[at]) for at, end in ends.items()}, 100):
            for message in messages:
                stage, partition = names[message.topic() or ""], message.partition() or 0
                headers = readable_headers(message)
                if message.offset() in wanted[stage, partition] and _resolved(message, headers) is None:
                    yield Record(_letter(stage, message, headers), message.value(), headers)
    finally:
        log.close()


def _open(settings: Settings, stages: Iterable[str]) -> tuple[Log, dict[str, str]]:
    names = Names(settings.topic_prefix)
    topics = {names.dead(stage): stage for stage in stages}
    return Log(settings, list(topics)), topics


def _put(board: Board, stage: str, message: Message) -> None:
    headers = readable_headers(message)
    done = _resolved(message, headers)
    if done is None:
        letter = _letter(stage, message, headers)
        board.letters[letter.place] = letter
        return
    partition = message.partition() or 0
    for offsets in done:
        start = board.starts.get((stage, partition), 0)
        # What was deleted since is not there.
        for offset in range(max(offsets.start, start), offsets.stop):
            board.letters.pop(Place(stage, partition, offset), None)


def _resolved(message: Message, headers: Headers) -> list[range] | None:
    return marker.resolved(message.offset() or 0, message.key(), message.value(), headers)


def _letter(stage: str, message: Message, headers: Headers) -> Letter:
    place = Place(stage, message.partition() or 0, message.offset() or 0)
    return letter_of(place, message.timestamp()[1], message.key(), headers)
