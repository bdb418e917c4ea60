"""From messages to records: what is decoded, what is faulty, what is held back."""

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
from services.common.kafka.topic_partition import RecordLocation
from services.common.stage.inflight import InFlight
from services.common.stage.intake import Intake
from services.common.stage.ledger import Fetched, Ledger
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


def build(clock: Clock) -> tuple[Intake, Ledger]:
    stage = Stage("sender", ["task.created"], DECODERS, handle=lambda _: Done(), delays=(5, 60))
    ledger = Ledger(InFlight(10, 1 << 20))
    intake = Intake(stage, Settings(topic_prefix="p."), ledger, clock, clock.monotonic)
    ledger.assign((topic, 0) for topic in intake.topics)
    return intake, ledger


def message(
    offset: int,
    topic: str = "p.task.created",
    value: bytes | None = TASK.value,
    headers: Headers | None = None,
) -> Message:
    return Message(
        topic=topic, partition=0, offset=offset, key=ID, value=value, headers=headers or TASK.headers
    )


def back(due: int, origin: str = "task.created", attempt: int = 3) -> Headers:
    return delayed_headers(
        TASK.headers, origin=RecordLocation(origin, 4, 17), attempt=attempt, cause="c", due_at_ms=due
    )


def test_topics_are_the_full_names_of_events_and_delays() -> None:
    intake, _ = build(Clock())
    assert intake.topics == ["p.task.created", "p.sender.delay.5", "p.sender.delay.60"]


def test_an_event_record_is_read_with_its_bare_topic_and_trace() -> None:
    intake, _ = build(Clock())
    record = intake.read(message(7))
    assert isinstance(record, Fetched)
    assert (record.topic, record.offset, record.attempt, record.fault) == ("task.created", 7, 1, None)
    assert record.traceparent == b"00-1-2-01"
    assert isinstance(record.event, pb.TaskCreated)
    assert record.event.task.email == "a@b.test"


@given(st.none() | st.binary(max_size=200))
def test_any_bytes_are_an_event_or_a_fault(value: bytes | None) -> None:
    intake, _ = build(Clock())
    record = intake.read(message(0, value=value))
    assert record is not None
    assert (record.event is None) == (record.fault is not None)


def test_what_is_not_owned_is_not_read() -> None:
    intake, ledger = build(Clock())
    ledger.let_go(ledger.owned())
    assert intake.read(message(0)) is None


def test_a_due_record_is_read_as_its_origin_and_attempt() -> None:
    intake, _ = build(Clock())
    record = intake.read(message(3, "p.sender.delay.5", headers=back(NOW)))
    assert record is not None
    assert (record.topic, record.attempt, record.fault) == ("task.created", 3, None)
    assert str(record.origin) == "task.created/4/17"
    assert isinstance(record.event, pb.TaskCreated)


def test_never_early_the_head_is_held_and_all_behind_it() -> None:
    clock = Clock()
    intake, ledger = build(clock)
    topic = "p.sender.delay.5"
    assert intake.read(message(3, topic, headers=back(NOW + 2000))) is None
    assert intake.read(message(4, topic, headers=back(NOW - 1))) is None
    assert intake.read(message(9)) is not None
    ((assignment, offset),) = intake.take_held()
    assert (assignment.topic, offset) == (topic, 3)
    assert intake.take_held() == []
    assert intake.held == 1
    assert intake.wait(0.1) == 0.1
    clock.now = NOW + 2000
    assert intake.release() == []  # a little later, so that more have fallen due
    clock.now = NOW + 2100
    assert intake.wait(0.1) == 0
    assert intake.release() == [assignment]
    assert intake.held == 0
    assert intake.read(message(3, topic, headers=back(NOW + 2000))) is not None
    assert assignment is ledger.find(topic, 0)


def test_a_hold_ends_with_its_assignment() -> None:
    intake, ledger = build(Clock())
    intake.read(message(3, "p.sender.delay.5", headers=back(NOW + 2000)))
    gone = ledger.select([("p.sender.delay.5", 0)])
    ledger.let_go(gone)
    intake.forget(gone)
    assert intake.held == 0
    ledger.assign([("p.sender.delay.5", 0)])
    assert intake.read(message(3, "p.sender.delay.5", headers=back(NOW))) is not None


@pytest.mark.parametrize(
    ("headers", "cause"),
    [
        ([("ce_id", b"1")], "delayed record: origin"),
        (back(NOW, origin="who.knows"), "is not read here"),
    ],
)
def test_a_delayed_record_that_is_not_ours_is_a_fault_and_holds_nothing(headers: Headers, cause: str) -> None:
    intake, _ = build(Clock())
    record = intake.read(message(3, "p.sender.delay.5", headers=headers))
    assert record is not None
    assert record.fault is not None
    assert cause in record.fault
    assert intake.held == 0


@pytest.mark.parametrize("ahead_ms", [60_000, 10**15])
def test_a_record_of_a_clock_that_is_ahead_waits_its_delay_and_is_no_dead_letter(ahead_ms: int) -> None:
    clock = Clock()
    intake, _ = build(clock)
    topic, headers = "p.sender.delay.5", back(NOW + 5000 + ahead_ms)
    for offset in (3, 4):
        # The one behind was there as early, so it waits no second time.
        while (record := intake.read(message(offset, topic, headers=headers))) is None:
            ((assignment, head),) = intake.take_held()
            assert head == offset == 3
            intake.saw(assignment, 5)
            assert assignment.held_until is not None
            clock.now = round(1000 * assignment.held_until)
            assert intake.release() == [assignment]
        assert (record.fault, record.attempt) == (None, 3)
        assert clock.now == NOW + 5500


@pytest.mark.parametrize("lost", ["due-at", "attempt", "origin"])
def test_a_faulty_delayed_record_keeps_the_origin_and_attempt_that_can_be_read(lost: str) -> None:
    intake, _ = build(Clock())
    headers = [header for header in back(NOW) if header[0] != lost]
    record = intake.read(message(3, "p.sender.delay.5", headers=headers))
    assert record is not None
    assert record.fault is not None
    assert record.attempt == (1 if lost == "attempt" else 3)
    assert record.origin == (None if lost == "origin" else RecordLocation("task.created", 4, 17))


class _WithABadName:
    """A message with a header whose name is not UTF-8, as confluent_kafka has it. Ask it once."""

    def __init__(self, plain: Message) -> None:
        self._plain, self.asked = plain, 0

    def headers(self) -> Headers:
        self.asked += 1
        raise SystemError("<method 'headers'> returned a result with an exception set")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


@pytest.mark.parametrize("topic", ["task.created", "sender.delay.60"])
def test_headers_that_cannot_be_read_are_a_fault_of_that_record_alone(topic: str) -> None:
    intake, ledger = build(Clock())
    bad = _WithABadName(message(7, "p." + topic))
    record = intake.read(bad)
    assert record is not None
    assert (record.offset, record.topic, record.value, record.headers) == (7, topic, TASK.value, None)
    assert record.fault == "headers that cannot be read: SystemError"
    assert bad.asked == 1
    ledger.take(record)
    assert isinstance(intake.read(message(8)), Fetched)
