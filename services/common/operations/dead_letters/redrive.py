"""Redrives the records of dead letters, and purges dead letters. Blocks.

A dead letter is resolved once its record is acked. If the process dies between the two, the dead letter stays
and is redriven again. Its record is then twice on its topic, as after any redelivery. Every stage tolerates
that: the fold is a join, a domain's verdict is found again, and `deliveries` knows the mails that were sent
or claimed.

Raises `confluent_kafka.KafkaException`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import NamedTuple

import confluent_kafka
from confluent_kafka import KafkaError

from services.common.config import Settings
from services.common.kafka.admin import admin_client
from services.common.kafka.headers import delayed_headers, original_headers
from services.common.kafka.records import Headers
from services.common.kafka.topics import EVENT_TOPICS, Names
from services.common.operations import installation
from services.common.operations.clients import TIMEOUT
from services.common.operations.dead_letters.dead_letter import DeadLetter, DeadLetterLocation
from services.common.operations.dead_letters.reader import (
    OriginLost,
    read_origin,
    read_records,
    read_unresolved,
)
from services.common.operations.dead_letters.resolution import (
    MAX_OFFSETS,
    DeadLetterResolution,
    resolution_headers,
)
from services.common.operations.record_producer import RecordProducer
from services.common.stages import DELAYING, STAGES

__all__ = ["RedriveTarget", "can_redrive", "purge", "redrive", "redrive_target"]

# Records that are produced before their dead letters are resolved.
_BATCH = 200


class RedriveTarget(NamedTuple):
    """Where a record is redriven to: the topic (bare name) and the record's headers."""

    topic: str
    headers: Headers


def can_redrive(dead_letter: DeadLetter) -> bool:
    """Return whether it is known which event topic the record came from."""
    return dead_letter.origin is not None and dead_letter.origin.topic in EVENT_TOPICS


def redrive_target(
    dead_letter: DeadLetter, headers: Headers | None, delays: Mapping[str, tuple[int, ...]]
) -> RedriveTarget:
    """Return where a record is redriven to. Pure.

    A record that failed at its first attempt goes to its event topic with its first headers. One that failed
    later goes to a delay topic of its stage, as the same attempt and due at once. On its event topic it would
    be a first attempt, to which the claim would answer Stale.

    `headers` are all headers of the dead letter, and `delays` each stage's delays in seconds.
    """
    origin, stage = dead_letter.origin, dead_letter.location.stage
    assert origin is not None
    first, own = original_headers(headers), delays.get(stage)
    # A record of a topic that its stage does not read would become a dead letter again.
    if dead_letter.attempt > 1 and own and origin.topic in STAGES[stage].reads:
        delayed = delayed_headers(
            first, origin=origin, attempt=dead_letter.attempt, cause="replayed", due_at_ms=0
        )
        return RedriveTarget(Names().delay(stage, own[0]), delayed)
    return RedriveTarget(origin.topic, first)


def redrive(
    settings: Settings,
    dead_letters: Sequence[DeadLetter],
    on_done: Callable[[int], None],
    on_kept: Callable[[str], None] = lambda why: None,
) -> int:
    """Produce the records of these dead letters again, each to its `redrive_target`.

    All must satisfy `can_redrive`. What a dead letter does not carry is read at its origin. A dead letter
    stays where its origin is lost or Kafka refuses its record; `on_kept` gets the location and the reason.
    Dead letters of one record that go to one topic have it produced once. `on_done` gets the number of
    further resolved dead letters. Returns their sum, without those that somebody else resolved and deleted
    meanwhile.
    """
    names, producer = Names(settings.topic_prefix), RecordProducer(settings)
    stages = {one.location.stage for one in dead_letters if one.attempt > 1} & {*DELAYING}
    delays = installation.current_delays(settings, stages) if stages else {}
    done, batch = 0, dict[DeadLetterLocation, None]()

    locations: dict[bytes, list[DeadLetterLocation]] = {}
    refusals: dict[bytes, KafkaError] = {}

    def refuse(same: bytes, why: KafkaError) -> None:
        refusals[same] = why
        for location in locations[same]:
            batch.pop(location)
            on_kept(f"{location}: {why.str()}")

    for dead_letter, value, headers in read_records(settings, [one.location for one in dead_letters]):
        key = dead_letter.key
        if dead_letter.left_out:
            try:
                key, value, headers = read_origin(settings, dead_letter)  # noqa: PLW2901
            except OriginLost as why:
                on_kept(str(why))
                continue
        target = redrive_target(dead_letter, headers, delays)
        location, same = dead_letter.location, _identity(dead_letter, target.topic, key, value)
        if same in refusals:
            on_kept(f"{location}: {refusals[same].str()}")
            continue
        batch[location] = None
        locations.setdefault(same, []).append(location)
        if len(locations[same]) == 1:
            topic = names.topic(target.topic)
            producer.put(topic, key, value, target.headers, on_refusal=partial(refuse, same))
        if len(batch) == _BATCH:
            done += _finish_batch(producer, names, batch, on_done)
            batch.clear()
    done += _finish_batch(producer, names, batch, on_done)
    _delete_resolved(settings, dead_letters)
    return done


def purge(settings: Settings, dead_letters: Sequence[DeadLetter], on_done: Callable[[int], None]) -> int:
    """Resolve these dead letters without redriving their records. Returns how many."""
    producer = RecordProducer(settings)
    _resolve(producer, Names(settings.topic_prefix), [one.location for one in dead_letters], "purged")
    on_done(len(dead_letters))
    _delete_resolved(settings, dead_letters)
    return len(dead_letters)


def _identity(dead_letter: DeadLetter, topic: str, key: bytes | None, value: bytes | None) -> bytes:
    """Return what dead letters of one record have in common where it goes to one topic as one attempt."""
    attempt = dead_letter.attempt if topic not in EVENT_TOPICS else 0
    # The origin alone does not identify a record: the offsets of a recreated topic begin at 0 again.
    found = sha256(repr((topic, str(dead_letter.origin), attempt, key, value is None)).encode())
    found.update(value or b"")
    return found.digest()


def _finish_batch(
    producer: RecordProducer,
    names: Names,
    locations: Collection[DeadLetterLocation],
    on_done: Callable[[int], None],
) -> int:
    # The flush removes the refused ones from `locations`.
    producer.flush()
    _resolve(producer, names, locations, "replayed")
    on_done(len(locations))
    return len(locations)


def _resolve(
    producer: RecordProducer,
    names: Names,
    locations: Collection[DeadLetterLocation],
    resolution: DeadLetterResolution,
) -> None:
    offsets: dict[tuple[str, int], list[int]] = defaultdict(list)
    for location in locations:
        offsets[location.stage, location.partition].append(location.offset)
    for (stage, partition), resolved in offsets.items():
        resolved.sort()
        for start in range(0, len(resolved), MAX_OFFSETS):
            headers = resolution_headers(resolved[start : start + MAX_OFFSETS], resolution)
            producer.put(names.dead(stage), None, None, headers, partition=partition)
    producer.flush()


def _delete_resolved(settings: Settings, dead_letters: Sequence[DeadLetter]) -> None:
    """Delete what is resolved at the start of these dead letters' partitions."""
    partitions = {(one.location.stage, one.location.partition) for one in dead_letters}
    names = Names(settings.topic_prefix)
    unresolved = read_unresolved(settings, sorted({stage for stage, _ in partitions}))
    until = {partition: unresolved.ends[partition] for partition in partitions}
    for location in unresolved.dead_letters:
        partition = location.stage, location.partition
        if partition in until:
            until[partition] = min(until[partition], location.offset)
    asked = [
        confluent_kafka.TopicPartition(names.dead(stage), number, offset)
        for (stage, number), offset in until.items()
        if offset > unresolved.starts[stage, number]
    ]
    if asked:
        client = admin_client(settings)  # its answers arrive only while it exists
        for answer in client.delete_records(asked, request_timeout=TIMEOUT).values():
            answer.result()
