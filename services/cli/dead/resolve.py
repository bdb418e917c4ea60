"""Letters sent back to their topics, and done away with. Blocks; raises `confluent_kafka.KafkaException`.

A replayed letter is resolved once its record is acked. Whoever dies between the two leaves the letter on the
board, and it is replayed again: the record is then twice on its topic, as after any redelivery. Every stage
bears that: the fold is a join, a verdict on a domain is found again, and a mail that went out or that
somebody sends stands in `deliveries`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from hashlib import sha256

from confluent_kafka import KafkaError, TopicPartition

from services.cli import installation
from services.cli.dead.back import back
from services.cli.dead.board import read_board, records
from services.cli.dead.letter import Letter, Place
from services.cli.dead.marker import MOST, Resolution, headers_of
from services.cli.dead.source import Gone, source
from services.cli.kafka import TIMEOUT, admin
from services.cli.sink import Sink
from services.common.config import Settings
from services.common.kafka.topics import EVENT_TOPICS, Names
from services.common.stages import DELAYING

__all__ = ["purge", "replay"]

# Letters that are sent back before they are marked.
_BATCH = 200


def replay(
    settings: Settings,
    letters: Sequence[Letter],
    advance: Callable[[int], None],
    stays: Callable[[str], None] = lambda why: None,
) -> int:
    """Produce the record of each of these letters again, where `back` says and as it says.

    They must be `replayable`. What a letter does not carry is read where it came from. A letter stays where
    that is gone, or where its record cannot be produced; `stays` is told which one and why. A record that
    died in several stages is produced once for all of its letters that go to one topic. `advance` is told how
    many more are done. Returns how many are; a letter that somebody else has resolved and that is deleted
    meanwhile is not.
    """
    names, sink = Names(settings.topic_prefix), Sink(settings)
    stages = {letter.place.stage for letter in letters if letter.attempt > 1} & {*DELAYING}
    delays = installation.delays(settings, stages) if stages else {}
    done, batch = 0, dict[Place, None]()

    places: dict[bytes, list[Place]] = {}
    refusals: dict[bytes, KafkaError] = {}

    def refused(same: bytes, why: KafkaError) -> None:
        refusals[same] = why
        for place in places[same]:
            batch.pop(place)
            stays(f"{place}: {why.str()}")

    for record in records(settings, [letter.place for letter in letters]):
        key, value, carried = record.letter.key, record.value, record.headers
        if record.letter.left_out:
            try:
                key, value, carried = source(settings, record.letter)
            except Gone as why:
                stays(str(why))
                continue
        topic, headers = back(record.letter, carried, delays)
        place, same = record.letter.place, _identity(record.letter, topic, key, value)
        if same in refusals:
            stays(f"{place}: {refusals[same].str()}")
            continue
        batch[place] = None
        places.setdefault(same, []).append(place)
        if len(places[same]) == 1:
            sink.put(names.topic(topic), key, value, headers, refused=partial(refused, same))
        if len(batch) == _BATCH:
            done += _replayed(sink, names, batch, advance)
            batch.clear()
    done += _replayed(sink, names, batch, advance)
    _delete(settings, {(letter.place.stage, letter.place.partition) for letter in letters})
    return done


def purge(settings: Settings, letters: Sequence[Letter], advance: Callable[[int], None]) -> int:
    """Resolve these letters without their records; return how many."""
    sink = Sink(settings)
    _mark(sink, Names(settings.topic_prefix), [letter.place for letter in letters], "purged")
    advance(len(letters))
    _delete(settings, {(letter.place.stage, letter.place.partition) for letter in letters})
    return len(letters)


def _identity(letter: Letter, topic: str, key: bytes | None, value: bytes | None) -> bytes:
    """Return what is the same for letters of one record that goes to one topic (bare name) as one attempt."""
    attempt = letter.attempt if topic not in EVENT_TOPICS else 0
    # Not the origin alone: a topic that was deleted and made anew begins at 0 again.
    found = sha256(repr((topic, str(letter.origin), attempt, key, value is None)).encode())
    found.update(value or b"")
    return found.digest()


def _replayed(sink: Sink, names: Names, places: Collection[Place], advance: Callable[[int], None]) -> int:
    # Those that are refused leave `places`.
    sink.flush()
    _mark(sink, names, places, "replayed")
    advance(len(places))
    return len(places)


def _mark(sink: Sink, names: Names, places: Collection[Place], resolution: Resolution) -> None:
    offsets: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place in places:
        offsets[place.stage, place.partition].append(place.offset)
    for (stage, partition), resolved in offsets.items():
        resolved.sort()
        for start in range(0, len(resolved), MOST):
            headers = headers_of(resolved[start : start + MOST], resolution)
            sink.put(names.dead(stage), None, None, headers, partition=partition)
    sink.flush()


def _delete(settings: Settings, partitions: Collection[tuple[str, int]]) -> None:
    """Delete what is resolved from the start of each of these partitions on."""
    names = Names(settings.topic_prefix)
    board = read_board(settings, sorted({stage for stage, _ in partitions}))
    until = {at: board.ends[at] for at in partitions}
    for place in board.letters:
        at = place.stage, place.partition
        if at in until:
            until[at] = min(until[at], place.offset)
    asked = [
        TopicPartition(names.dead(stage), partition, offset)
        for (stage, partition), offset in until.items()
        if offset > board.starts[stage, partition]
    ]
    if asked:
        client = admin(settings)  # the answers come as long as it is there
        for answer in client.delete_records(asked, request_timeout=TIMEOUT).values():
            answer.result()
