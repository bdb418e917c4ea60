"""The records of a replay: the offsets that it reads, decoding them, and the records that it produces.

A record is produced with its key, its value and its headers, and `replay-id` on top. Where its epoch changes,
its event is encoded anew. All replays of that epoch encode it alike, so that a record that is produced twice
is one event.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from datetime import datetime
from typing import Any, Literal, NamedTuple

from postroad.v1 import events_pb2 as pb
from services.common.config import Settings
from services.common.events import DECODERS, Event, Undecodable, encode
from services.common.kafka.headers import (
    REPLAY_ID,
    DelayedHeaders,
    delayed_headers,
    parse_delayed_headers,
    readable_headers,
)
from services.common.kafka.records import Headers, MalformedHeaders, OutgoingRecord, traceparent
from services.common.kafka.topic_partition import RecordLocation, TopicPartition
from services.common.kafka.topics import EVENT_TOPICS, MX_OK, TASK_CREATED, Names, delay_of
from services.common.operations.replay.replay_decision import ReplayDecision
from services.common.operations.topic_reader import TopicReader
from services.common.stages import DELAYING, STAGES

__all__ = [
    "WORK_TOPICS",
    "DecodedRecord",
    "OffsetRange",
    "Point",
    "ReplayedRecord",
    "can_replay",
    "decode",
    "offset_ranges",
    "read_batches",
    "replayed",
]

WORK_TOPICS = (TASK_CREATED, MX_OK)
"""The topics whose records make a stage work."""

Point = Literal["start", "end"] | int | datetime
"""Where a replay begins or ends: an end of each partition, an offset in every partition, or a time (UTC)."""


class OffsetRange(NamedTuple):
    """The offsets of a partition that are still to be read: from `next` up to `end`, without `end`."""

    next: int
    end: int

    @property
    def left(self) -> int:
        """How many offsets are left."""
        return max(0, self.end - self.next)


class ReplayedRecord(NamedTuple):
    """A record as it is on its topic (bare name)."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers | None


class DecodedRecord(NamedTuple):
    """A record's event, and its own headers where it comes from a delay topic."""

    event: Event
    delayed: DelayedHeaders | None = None


def can_replay(topic: str) -> bool:
    """Return whether a topic (bare name) can be replayed: an event topic, or a delay topic of a stage.

    Pure.
    """
    seconds = delay_of(topic)
    return topic in EVENT_TOPICS or topic in {Names().delay(stage, seconds or 0) for stage in DELAYING}


def decode(record: ReplayedRecord) -> DecodedRecord:
    """Decode a record. Pure. Raises Undecodable."""
    if record.topic in DECODERS:
        return DecodedRecord(DECODERS[record.topic](record.value))
    stage = record.topic.partition(".")[0]
    try:
        delayed = parse_delayed_headers(record.headers)
    except MalformedHeaders as error:
        raise Undecodable(str(error)) from error
    if delayed.origin.topic not in STAGES[stage].reads:
        raise Undecodable(f"its origin {delayed.origin.topic} is not read by {stage}")
    return DecodedRecord(DECODERS[delayed.origin.topic](record.value), delayed)


def replayed(
    record: ReplayedRecord, decoded: DecodedRecord, decision: ReplayDecision, replay_id: str, delay_topic: str
) -> OutgoingRecord:
    """Return the record to produce. Pure. With an attempt it goes to `delay_topic` and is due at once."""
    event, headers = decoded.event, list(record.headers or ())
    key, value = record.key, record.value
    if event.epoch != decision.epoch and isinstance(event, pb.TaskCreated | pb.MxOk):
        encoded = encode(_in_epoch(event, decision.epoch), "replay", traceparent(record.headers))
        key, value, headers = encoded.key, encoded.value, encoded.headers
    topic = record.topic
    if decision.attempt:
        topic = delay_topic
        origin = RecordLocation(record.topic, record.partition, record.offset)
        headers = delayed_headers(
            headers, origin=origin, attempt=decision.attempt, cause="replayed", due_at_ms=0
        )
    headers = [header for header in headers if header[0] != REPLAY_ID]
    headers.append((REPLAY_ID, replay_id.encode()))
    return OutgoingRecord(topic, key or b"", value or b"", headers)


def _in_epoch(event: pb.TaskCreated | pb.MxOk, epoch: int) -> pb.TaskCreated | pb.MxOk:
    moved = copy(event)
    moved.epoch = epoch
    # As for a retry, an epoch is the time in milliseconds at which the task was reopened.
    moved.at_us = epoch * 1000
    moved.send_at_us = 0
    return moved


def offset_ranges(settings: Settings, topic: str, start: Point, end: Point) -> dict[int, OffsetRange]:
    """Return the present offsets between two points of a topic (bare name), by partition.

    Blocks. Raises `confluent_kafka.KafkaException`, and NotFound where the topic does not exist.
    """
    reader = TopicReader(settings, [Names(settings.topic_prefix).topic(topic)])
    try:
        ends = reader.ends()
        first, last = _offsets(reader, ends, start), _offsets(reader, ends, end)
    finally:
        reader.close()
    return {at.partition: OffsetRange(first[at], max(first[at], last[at])) for at in sorted(ends)}


def _offsets(
    reader: TopicReader, ends: Mapping[TopicPartition, int], point: Point
) -> Mapping[TopicPartition, int]:
    if point == "start":
        return reader.start
    if point == "end":
        return ends
    if isinstance(point, int):
        return {at: min(max(reader.start[at], point), end) for at, end in ends.items()}
    # A partition without a record of that time or later has its end there. More may have arrived since
    # `ends`.
    found = reader.since(round(point.timestamp() * 1000))
    return {at: min(found[at], end) for at, end in ends.items()}


def read_batches(
    settings: Settings, topic: str, ranges: Mapping[int, OffsetRange], limit: int
) -> Iterator[list[ReplayedRecord]]:
    """Yield the records of these ranges, at most `limit` at a time, in each partition's order.

    Any offset may be missing. Blocks. Raises `confluent_kafka.KafkaException`.
    """
    name = Names(settings.topic_prefix).topic(topic)
    reader = TopicReader(settings, [name])
    try:
        reader.next.update({TopicPartition(name, number): range_.next for number, range_ in ranges.items()})
        ends = {TopicPartition(name, number): range_.end for number, range_ in ranges.items() if range_.left}
        for messages in reader.read(ends, limit):
            yield [_record(topic, message) for message in messages]
    finally:
        reader.close()


def _record(topic: str, message: Any) -> ReplayedRecord:
    headers = readable_headers(message)
    return ReplayedRecord(
        topic, message.partition(), message.offset(), message.key(), message.value(), headers
    )
