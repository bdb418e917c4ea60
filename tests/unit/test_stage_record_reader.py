"""RecordReader: what it decodes, what it marks as faulty, what it holds back."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka import Message
from hypothesis import given
from hypothesis import strategies as st

from postroad.v1 import events_pb2 as pb
from services.common.config import Settings
from services.common.events import DECODERS, encode
from services.common.kafka.headers import delayed_headers
from services.common.kafka.records import Headers
from services.common.kafka.topic_partition import RecordLocation, TopicPartition
from services.common.stage.in_flight_limit import InFlightLimit
from services.common.stage.in_flight_record import InFlightRecord
from services.common.stage.partition_tracker import PartitionTracker
from services.common.stage.record_reader import RecordReader
from services.common.stage.types import Done, Stage

ID = bytes(range(16))
TASK = encode(pb.TaskCreated(task=pb.MailTask(id=ID, email="a@b.test"), at_us=1), "api", b"00-1-2-01")
NOW = 1_000_000


class Clock:
    now = NOW

    def __call__(self) -> int:
        return self.now

    def monotonic(self) -> float:
        return self.now / 1000


def build(clock: Clock) -> tuple[RecordReader, PartitionTracker]:
    stage = Stage("sender", ["task.created"], DECODERS, handle=lambda _: Done(), delays=(5, 60))
    tracker = PartitionTracker(InFlightLimit(10, 1 << 20))
    reader = RecordReader(stage, Settings(topic_prefix="p."), tracker, clock, clock.monotonic)
    tracker.assign(TopicPartition(topic, 0) for topic in reader.topics)
    return reader, tracker


def message(
    offset: int,
    topic: str = "p.task.created",
    value: bytes | None = TASK.value,
    headers: Headers | None = None,
) -> Message:
    return Message(
        topic=topic, partition=0, offset=offset, key=ID, value=value, headers=headers or TASK.headers
    )


def delayed(due: int, origin: str = "task.created", attempt: int = 3) -> Headers:
    return delayed_headers(
        TASK.headers, origin=RecordLocation(origin, 4, 17), attempt=attempt, cause="c", due_at_ms=due
    )


def test_topics_are_the_full_names_of_event_and_delay_topics() -> None:
    reader, _ = build(Clock())
    assert reader.topics == ["p.task.created", "p.sender.delay.5", "p.sender.delay.60"]


def test_an_event_record_is_read_with_its_bare_topic_and_trace() -> None:
    reader, _ = build(Clock())
    record = reader.read(message(7))
    assert isinstance(record, InFlightRecord)
    assert (record.topic, record.offset, record.attempt, record.undecodable) == ("task.created", 7, 1, None)
    assert record.traceparent == b"00-1-2-01"
    assert isinstance(record.event, pb.TaskCreated)
    assert record.event.task.email == "a@b.test"


@given(st.none() | st.binary(max_size=200))
def test_any_value_is_an_event_or_a_fault(value: bytes | None) -> None:
    reader, _ = build(Clock())
    record = reader.read(message(0, value=value))
    assert record is not None
    assert (record.event is None) == (record.undecodable is not None)


def test_a_partition_that_is_not_owned_is_not_read() -> None:
    reader, tracker = build(Clock())
    tracker.release_partitions(tracker.owned())
    assert reader.read(message(0)) is None


def test_a_due_record_is_read_as_its_origin_and_attempt() -> None:
    reader, _ = build(Clock())
    record = reader.read(message(3, "p.sender.delay.5", headers=delayed(NOW)))
    assert record is not None
    assert (record.topic, record.attempt, record.undecodable) == ("task.created", 3, None)
    assert str(record.origin) == "task.created/4/17"
    assert isinstance(record.event, pb.TaskCreated)


def test_a_head_that_is_not_due_holds_its_partition() -> None:
    clock = Clock()
    reader, tracker = build(clock)
    topic = "p.sender.delay.5"
    assert reader.read(message(3, topic, headers=delayed(NOW + 2000))) is None
    assert reader.read(message(4, topic, headers=delayed(NOW - 1))) is None
    assert reader.read(message(9)) is not None
    ((assignment, offset),) = reader.pop_new_holds()
    assert (assignment.topic, offset) == (topic, 3)
    assert reader.pop_new_holds() == []
    assert reader.held == 1
    assert reader.seconds_until_due(0.1) == 0.1
    clock.now = NOW + 2000
    assert reader.end_due_holds() == []  # it ends a little later, when more records are due
    clock.now = NOW + 2100
    assert reader.seconds_until_due(0.1) == 0
    assert reader.end_due_holds() == [assignment]
    assert reader.held == 0
    assert reader.read(message(3, topic, headers=delayed(NOW + 2000))) is not None
    assert assignment is tracker.find(topic, 0)


def test_a_hold_ends_with_its_assignment() -> None:
    reader, tracker = build(Clock())
    reader.read(message(3, "p.sender.delay.5", headers=delayed(NOW + 2000)))
    gone = tracker.select([TopicPartition("p.sender.delay.5", 0)])
    tracker.release_partitions(gone)
    reader.drop_holds(gone)
    assert reader.held == 0
    tracker.assign([TopicPartition("p.sender.delay.5", 0)])
    assert reader.read(message(3, "p.sender.delay.5", headers=delayed(NOW))) is not None


@pytest.mark.parametrize(
    ("headers", "cause"),
    [
        ([("ce_id", b"1")], "delayed record: origin"),
        (delayed(NOW, origin="who.knows"), "is not read here"),
    ],
)
def test_a_foreign_record_on_a_delay_topic_is_faulty_and_holds_nothing(headers: Headers, cause: str) -> None:
    reader, _ = build(Clock())
    record = reader.read(message(3, "p.sender.delay.5", headers=headers))
    assert record is not None
    assert record.undecodable is not None
    assert cause in record.undecodable
    assert reader.held == 0


@pytest.mark.parametrize("ahead_ms", [60_000, 10**15])
def test_a_record_from_a_clock_that_is_ahead_waits_its_delay_and_is_not_faulty(ahead_ms: int) -> None:
    clock = Clock()
    reader, _ = build(clock)
    topic, headers = "p.sender.delay.5", delayed(NOW + 5000 + ahead_ms)
    for offset in (3, 4):
        # The second record came as early, so it does not wait again.
        while (record := reader.read(message(offset, topic, headers=headers))) is None:
            ((assignment, head),) = reader.pop_new_holds()
            assert head == offset == 3
            reader.note_end(assignment, 5)
            assert assignment.held_until is not None
            clock.now = round(1000 * assignment.held_until)
            assert reader.end_due_holds() == [assignment]
        assert (record.undecodable, record.attempt) == (None, 3)
        assert clock.now == NOW + 5500


@pytest.mark.parametrize("lost", ["due-at", "attempt", "origin"])
def test_a_faulty_delayed_record_keeps_the_origin_and_attempt_that_can_be_read(lost: str) -> None:
    reader, _ = build(Clock())
    headers = [header for header in delayed(NOW) if header[0] != lost]
    record = reader.read(message(3, "p.sender.delay.5", headers=headers))
    assert record is not None
    assert record.undecodable is not None
    assert record.attempt == (1 if lost == "attempt" else 3)
    assert record.origin == (None if lost == "origin" else RecordLocation("task.created", 4, 17))


class _UnreadableHeaders:
    """A message with a header name that is not UTF-8, as confluent_kafka shows it. Counts the calls."""

    def __init__(self, plain: Message) -> None:
        self._plain, self.calls = plain, 0

    def headers(self) -> Headers:
        self.calls += 1
        raise SystemError("<method 'headers'> returned a result with an exception set")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


@pytest.mark.parametrize("topic", ["task.created", "sender.delay.60"])
def test_unreadable_headers_make_only_their_record_faulty(topic: str) -> None:
    reader, tracker = build(Clock())
    bad = _UnreadableHeaders(message(7, "p." + topic))
    record = reader.read(bad)
    assert record is not None
    assert (record.offset, record.topic, record.value, record.headers) == (7, topic, TASK.value, None)
    assert record.undecodable == "headers that cannot be read: SystemError"
    assert bad.calls == 1
    tracker.add(record)
    assert isinstance(reader.read(message(8)), InFlightRecord)
