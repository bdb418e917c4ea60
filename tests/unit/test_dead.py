"""Dead letters without Kafka: their locations, resolutions, filters and redrive targets."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postroad.v1 import events_pb2 as pb
from services.cli.command import CommandContext
from services.cli.dead_commands import _ask, _show_details
from services.cli.errors import Failure
from services.common.deliveries.decide import Claim, Delivery, DeliveryState, Settled, Stale, Taken, decide
from services.common.events import encode
from services.common.kafka import headers
from services.common.kafka.headers import LeftOut, parse_delayed_headers
from services.common.kafka.records import Headers
from services.common.kafka.topic_partition import RecordLocation
from services.common.operations.dead_letters.dead_letter import (
    DeadLetter,
    DeadLetterLocation,
    absent_locations,
    describe,
    filter_dead_letters,
    group_by_cause,
    parse_dead_letter,
    parse_location,
)
from services.common.operations.dead_letters.redrive import RedriveTarget, can_redrive, redrive_target
from services.common.operations.dead_letters.resolution import resolution_headers, resolved_offsets
from tests.event_strategies import mail_task

LOCATION = DeadLetterLocation("validator", 3, 17)


@given(st.sets(st.integers(0, 1 << 62), max_size=50) | st.sets(st.integers(0, 60), max_size=50))
def test_a_resolution_names_the_offsets_that_it_resolves(offsets: set[int]) -> None:
    written = resolution_headers(offsets, "purged")
    read = resolved_offsets(1 << 63, None, None, written) or []
    assert {offset for part in read for offset in part} == offsets
    assert written[1] == ("resolution", b"purged")


def test_an_overlong_number_in_a_foreign_record_is_ignored() -> None:
    digits = b"9" * 5000
    assert resolved_offsets(9, None, None, [("resolves", digits), ("resolution", b"purged")]) is None
    assert parse_dead_letter(LOCATION, 0, None, [("attempt", digits)]).attempt == 0


def test_adjacent_offsets_are_one_range() -> None:
    assert resolution_headers([9, 3, 4, 5], "replayed")[0] == ("resolves", b"3-5,9")


def test_a_dead_letter_is_no_resolution_and_a_bad_resolution_resolves_nothing() -> None:
    assert resolved_offsets(9, None, None, None) is None
    carried = headers.dead_letter_headers([], origin=RecordLocation("mx.ok", 0, 1), attempt=1, cause="c")
    assert resolved_offsets(9, None, None, carried) is None
    bad = [("resolves", b"x,-,1-,-2,\xff"), ("resolution", b"purged")]
    assert resolved_offsets(9, None, None, bad) == [range(1, 2)]


def test_a_resolution_resolves_earlier_offsets_only() -> None:
    later = resolution_headers([3, 4, 5, 6, 9], "purged")
    assert resolved_offsets(5, None, None, later) == [range(3, 5)]
    assert resolved_offsets(3, None, None, later) is None


def test_a_foreign_record_with_a_header_of_a_resolution_is_a_dead_letter() -> None:
    """Earlier versions kept such headers, so that topics have them."""
    foreign = [("resolves", b"0-4"), ("resolution", b"purged")]
    for key, value, carried in (
        (b"k", None, foreign),
        (None, b"v", foreign),
        (None, None, foreign[:1]),
        (None, None, [*foreign, ("attempt", b"1"), ("origin", b"mx.ok/0/1"), ("cause", b"c")]),
    ):
        assert resolved_offsets(9, key, value, carried) is None


@pytest.mark.parametrize("text", ["", "validator", "validator/1", "/1/2", "validator/-1/2", "validator/1/x"])
def test_a_location_is_stage_partition_offset(text: str) -> None:
    with pytest.raises(ValueError, match="STAGE/PARTITION/OFFSET"):
        parse_location(text)
    assert parse_location(str(LOCATION)) == LOCATION


def dead_letter(headers: Headers | None, key: bytes | None = None) -> DeadLetter:
    return parse_dead_letter(LOCATION, 1_763_976_543_123, key, headers)


def test_a_dead_letter_shows_its_event_decoded() -> None:
    record = encode(pb.TaskCreated(task=mail_task(1), at_us=5), "api", b"00-1-2-01")
    carried = headers.dead_letter_headers(
        record.headers, origin=RecordLocation("task.created", 3, 9), attempt=2, cause="KeyError: 'x'"
    )
    row = describe(dead_letter(carried, record.key), record.value, carried)
    assert (row["cause"], row["origin"], row["attempt"]) == ("KeyError: 'x'", "task.created/3/9", 2)
    assert row["event"]["type"] == "postroad.v1.TaskCreated"
    assert row["event"]["task"]["id"] == row["task"] == str(UUID(bytes=mail_task(1).id))
    assert row["event"]["task"]["subject"] == mail_task(1).subject
    assert row["headers"]["traceparent"] == "00-1-2-01"
    assert row["value"] is None
    assert row["time"] == "2025-11-24T09:29:03.123+00:00"
    assert headers.original_headers(carried) == record.headers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"\xff\x00", "0xff00"),
        (b"plain", "plain"),
        (b"a\nb\x1b[1m", "a\\nb\\u001b[1m"),
        (b"", ""),
        (None, None),
    ],
)
def test_an_undecodable_value_is_shown_without_control_characters(
    value: bytes | None, text: str | None
) -> None:
    carried = headers.dead_letter_headers(
        None, origin=RecordLocation("mail.sent", 0, 1), attempt=1, cause="not a MailSent"
    )
    row = describe(dead_letter(carried), value, carried)
    assert (row["event"], row["value"]) == (None, text)


def test_a_dead_letter_that_no_stage_wrote_can_only_be_purged() -> None:
    for foreign in (None, [("cause", b"\xff")], [("origin", b"nowhere"), ("attempt", b"x")]):
        assert dead_letter(foreign).origin is None
        assert not can_redrive(dead_letter(foreign))
        assert describe(dead_letter(foreign), b"x", foreign)["origin"] is None
    delayed = headers.dead_letter_headers(
        None, origin=RecordLocation("sender.delay.60", 0, 1), attempt=1, cause="due-at is missing"
    )
    assert not can_redrive(dead_letter(delayed))
    known = headers.dead_letter_headers(None, origin=RecordLocation("mx.ok", 0, 1), attempt=1, cause="")
    assert can_redrive(dead_letter(known))


def test_no_dead_letter_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    steering = "\x1b[2J\x9b31m"
    record = encode(pb.TaskCreated(task=pb.MailTask(id=b"k" * 16, subject=steering), at_us=5), "api")
    origin = RecordLocation("task.created", 3, 9)
    carried = headers.dead_letter_headers(
        [("x", steering.encode())], origin=origin, attempt=1, cause=steering
    )
    one = dead_letter(carried, record.key)
    with pytest.raises(Failure, match="--yes"):
        _ask("Purge", [one], False)
    _show_details(CommandContext({}), describe(one, record.value, carried))
    printed = capsys.readouterr()
    assert r"\x1b[2J\x9b31m" in printed.err
    assert not {"\x1b", "\x9b"} & {*printed.out, *printed.err}


def test_a_dead_letter_names_the_parts_that_it_does_not_carry() -> None:
    value = LeftOut.of("value", b"x" * 100)
    carried = headers.dead_letter_headers(
        None, origin=RecordLocation("mx.ok", 0, 1), attempt=2, cause="c", left_out=[value]
    )
    one = dead_letter(carried)
    assert one.left_out == (value,)
    row = describe(one, None, carried)
    assert (row["size"], row["left_out"]) == (
        100,
        [{"part": "value", "size": 100, "sha256": hashlib.sha256(b"x" * 100).hexdigest()}],
    )
    assert headers.original_headers(carried) == []
    assert dead_letter([header for header in carried if header[0] != "origin"]).left_out == ()


def test_dead_letters_are_grouped_by_stage_and_cause() -> None:
    def at(stage: str, offset: int, cause: str) -> DeadLetter:
        carried = headers.dead_letter_headers(
            None, origin=RecordLocation("mx.ok", 0, offset), attempt=1, cause=cause
        )
        return parse_dead_letter(DeadLetterLocation(stage, 0, offset), 1000 * offset, None, carried)

    dead_letters = [at("sender", 1, "b"), at("sender", 2, "a"), at("sender", 3, "a"), at("status", 4, "a")]
    rows = group_by_cause(dead_letters)
    assert [(row["stage"], row["cause"], row["count"]) for row in rows] == [
        ("sender", "a", 2),
        ("sender", "b", 1),
        ("status", "a", 1),
    ]
    assert (rows[0]["first"], rows[0]["last"]) == (dead_letters[1].time, dead_letters[2].time)
    assert (rows[0]["sample"], rows[0]["origins"]) == ("sender/0/3", ["mx.ok"])
    assert filter_dead_letters(dead_letters, set(), "a") == [
        dead_letters[1],
        dead_letters[2],
        dead_letters[3],
    ]
    there, gone = dead_letters[3].location, DeadLetterLocation("status", 0, 5)
    assert filter_dead_letters(dead_letters, {there, gone}, "") == [dead_letters[3]]
    assert absent_locations(dead_letters, {there, gone}) == [gone]


DELAYS = {"validator": (5, 30), "sender": (60, 300)}


def died(stage: str, topic: str, attempt: int) -> tuple[DeadLetter, Headers]:
    """Return a dead letter and its headers. Its record had the header `ce_id`."""
    carried = headers.dead_letter_headers(
        [("ce_id", b"1")], origin=RecordLocation(topic, 2, 40), attempt=attempt, cause="OSError"
    )
    return parse_dead_letter(DeadLetterLocation(stage, 0, 0), 1000, b"k" * 16, carried), carried


def test_a_record_that_failed_at_its_first_attempt_goes_to_its_event_topic() -> None:
    for stage, topic in (("validator", "task.created"), ("sender", "mx.ok"), ("status", "mail.sent")):
        assert redrive_target(*died(stage, topic, 1), DELAYS) == RedriveTarget(topic, [("ce_id", b"1")])


def test_a_stage_without_delays_or_without_the_topic_gets_no_delayed_record() -> None:
    assert redrive_target(*died("status", "mail.sent", 2), DELAYS) == RedriveTarget(
        "mail.sent", [("ce_id", b"1")]
    )
    assert redrive_target(*died("sender", "mail.sent", 2), DELAYS) == RedriveTarget(
        "mail.sent", [("ce_id", b"1")]
    )
    assert redrive_target(*died("validator", "task.created", 2), {"validator": ()}).topic == "task.created"


@pytest.mark.parametrize(
    ("stage", "topic", "delay"), [("validator", "task.created", 5), ("sender", "mx.ok", 60)]
)
def test_a_record_that_failed_at_a_retry_goes_to_a_delay_topic_as_that_attempt(
    stage: str, topic: str, delay: int
) -> None:
    for attempt in (2, 3):
        went = redrive_target(*died(stage, topic, attempt), DELAYS)
        assert went.topic == f"{stage}.delay.{delay}"
        came = parse_delayed_headers(went.headers)
        assert (came.attempt, came.due_at_ms, came.origin) == (attempt, 0, RecordLocation(topic, 2, 40))
        assert headers.original_headers(went.headers) == [("ce_id", b"1")]


@pytest.mark.parametrize("attempt", [2, 3])
@pytest.mark.parametrize(
    ("state", "before", "verdict"),
    [
        ("released", 0, Taken),
        ("sending", 0, Taken),
        # The attempt before it was deferred. This one failed before its claim.
        ("deferred", 1, Taken),
        # It was deferred again, and failed before it published that.
        ("deferred", 0, Settled),
    ],
)
def test_the_sender_claims_a_redriven_retry(
    state: DeliveryState, before: int, verdict: type, attempt: int
) -> None:
    now, lease = datetime(2026, 3, 1, 12), timedelta(seconds=20)
    id_ = bytes(range(16))
    row = Delivery(id_, state, 7, attempt - before, 0, b"o" * 16, now, 1, 1, "", "", "", "<m@x>")
    went = redrive_target(*died("sender", "mx.ok", attempt), DELAYS)
    claim = Claim(id_, 7, parse_delayed_headers(went.headers).attempt, b"n" * 16, "<m@x>")
    assert isinstance(decide(row, claim, now + lease, lease, False)[0], verdict)
    first = decide(row, claim._replace(attempt=1), now + lease, lease, False)[0]
    assert isinstance(first, Stale) == (row.attempt > 1), "why it does not go as a first attempt"
