"""The records of a replay: what was read of them, and what is produced. Pure.

A record goes again with its key, its value and its headers, and `replay-id` on top. Where its epoch changes,
the event is written anew, the same in every replay in that epoch: what is produced twice is one event.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

from postroad.v1 import events_pb2 as pb
from services.cli.replay.decide import Decision
from services.common.events import DECODERS, Event, Undecodable, encode
from services.common.kafka.headers import REPLAY_ID, DelayedHeaders, delayed_headers, parse_delayed_headers
from services.common.kafka.records import Headers, MalformedHeaders, OutgoingRecord, traceparent
from services.common.kafka.topic_partition import RecordLocation
from services.common.kafka.topics import EVENT_TOPICS, MX_OK, TASK_CREATED, Names, delay_of
from services.common.stages import DELAYING, STAGES

__all__ = ["WORK", "Read", "Seen", "again", "replayable", "see"]

WORK = (TASK_CREATED, MX_OK)
"""The topics whose records make a stage work."""


class Read(NamedTuple):
    """A record as it stands on its topic (bare name)."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers | None


class Seen(NamedTuple):
    """A record's event, and its return where it stands on a delay topic."""

    event: Event
    back: DelayedHeaders | None = None


def replayable(topic: str) -> bool:
    """Whether a topic (bare name) can be replayed: an event topic, or a delay topic of a stage."""
    seconds = delay_of(topic)
    return topic in EVENT_TOPICS or topic in {Names().delay(stage, seconds or 0) for stage in DELAYING}


def see(record: Read) -> Seen:
    """Decode a record. Raises Undecodable, saying why it cannot be."""
    if record.topic in DECODERS:
        return Seen(DECODERS[record.topic](record.value))
    stage = record.topic.partition(".")[0]
    try:
        back = parse_delayed_headers(record.headers)
    except MalformedHeaders as error:
        raise Undecodable(str(error)) from error
    if back.origin.topic not in STAGES[stage].reads:
        raise Undecodable(f"its origin {back.origin.topic} is not read by {stage}")
    return Seen(DECODERS[back.origin.topic](record.value), back)


def again(record: Read, seen: Seen, decision: Decision, replay_id: str, delay_topic: str) -> OutgoingRecord:
    """Return the record to be produced. What goes as an attempt goes to `delay_topic`, and is due at once."""
    event, headers = seen.event, list(record.headers or ())
    key, value = record.key, record.value
    if event.epoch != decision.epoch and isinstance(event, pb.TaskCreated | pb.MxOk):
        fresh = encode(_moved(event, decision.epoch), "replay", traceparent(record.headers))
        key, value, headers = fresh.key, fresh.value, fresh.headers
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


def _moved(event: pb.TaskCreated | pb.MxOk, epoch: int) -> pb.TaskCreated | pb.MxOk:
    moved = copy(event)
    moved.epoch = epoch
    # As a retry's: an epoch is the time at which the task was reopened.
    moved.at_us = epoch * 1000
    moved.send_at_us = 0
    return moved
