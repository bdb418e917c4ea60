"""The fold: a task's events in any order, with duplicates, make the same row."""

from __future__ import annotations

import random
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postroad.v1 import events_pb2 as pb
from services.common.database.tables import tasks
from services.common.database.times import from_micros, to_micros
from services.common.events import Event
from services.common.fold import TaskRow, delta, fold, merge
from tests.event_strategies import distinct, events_of, histories, mail_task

TASK = mail_task(0)
ID = TASK.id
AT = 1_763_976_543_123_456
without_deadline = settings(deadline=None)  # a busy machine is slow
LATER = 1_763_976_600_000  # an epoch


def created(epoch: int = 0) -> pb.TaskCreated:
    return pb.TaskCreated(task=TASK, epoch=epoch, at_us=AT)


def mx_ok(attempt: int = 1, epoch: int = 0) -> pb.MxOk:
    return pb.MxOk(task=TASK, epoch=epoch, attempt=attempt, at_us=AT + 1)


def deferred(attempt: int, stage: str = "sender", epoch: int = 0, **more: object) -> pb.MailDeferred:
    return pb.MailDeferred(id=ID, epoch=epoch, attempt=attempt, stage=stage, at_us=AT + 2, **more)  # type: ignore[arg-type]


def failed(attempt: int = 1, epoch: int = 0, uncertain: bool = False) -> pb.MailFailed:
    return pb.MailFailed(id=ID, epoch=epoch, attempt=attempt, uncertain=uncertain, at_us=AT + 3)


def sent(attempt: int = 1, epoch: int = 0) -> pb.MailSent:
    return pb.MailSent(id=ID, epoch=epoch, attempt=attempt, message_id="<m@x>", reply="250 ok", at_us=AT + 4)


def cancelled(epoch: int = 0) -> pb.TaskCancelled:
    return pb.TaskCancelled(id=ID, epoch=epoch, at_us=AT + 5)


def mx_failed(attempt: int = 1, epoch: int = 0) -> pb.MxFailed:
    return pb.MxFailed(id=ID, epoch=epoch, attempt=attempt, reason="null_mx", at_us=AT + 6)


def folded(events: list[Event]) -> TaskRow:
    row: TaskRow | None = None
    for event in events:
        row = fold(row, event)
    assert row is not None
    return row


def version(event: Event) -> tuple[bytes, int]:
    row = delta(event)
    return row.id, row.version


def test_a_row_has_the_columns_of_its_table_in_their_order() -> None:
    assert TaskRow._fields == tuple(tasks.columns.keys())


# A task step by step: each event outranks all before it, in whatever order they arrive.
LIFE: list[tuple[Event, str]] = [
    (created(), "pending"),
    (deferred(1, "validator"), "pending"),
    (deferred(2, "validator"), "pending"),
    (mx_ok(3), "processing"),
    (mx_failed(1), "failed"),
    (deferred(1, in_doubt=True), "processing"),
    (deferred(1, in_doubt=True, takeover=1), "processing"),
    (deferred(1), "processing"),
    (deferred(2), "processing"),
    (deferred(3, in_doubt=True), "processing"),
    (cancelled(), "cancelled"),
    (failed(3), "failed"),
    (failed(3, uncertain=True), "uncertain"),
    (created(LATER), "pending"),
    (mx_ok(1, LATER), "processing"),
    (deferred(1, epoch=LATER), "processing"),
    (failed(2, LATER), "failed"),
    (created(LATER + 1), "pending"),
    (sent(1, 0), "completed"),
    (sent(1, LATER), "completed"),
    (sent(2, LATER), "completed"),
]


def test_each_step_of_a_task_outranks_the_ones_before() -> None:
    versions = [delta(event).version for event, _ in LIFE]
    assert versions == sorted(set(versions))
    assert all(0 <= version < 1 << 64 for version in versions)
    for count in range(1, len(LIFE) + 1):
        seen = [event for event, _ in LIFE[:count]]
        for shuffle in range(5):
            random.Random(shuffle).shuffle(seen)
            assert folded(seen).status == LIFE[count - 1][1]


def test_completed_absorbs_whatever_comes() -> None:
    row = folded([sent()])
    for event, _ in LIFE[:-3]:
        after = fold(row, event)
        assert after.status == "completed"
        assert (after.reply, after.message_id, after.updated_at) == ("250 ok", "<m@x>", from_micros(AT + 4))


def test_a_later_epoch_reopens_and_an_earlier_one_changes_nothing() -> None:
    row = folded([created(), mx_ok(), failed(5)])
    assert (row.status, row.attempts) == ("failed", 5)
    row = fold(row, created(LATER))
    assert (row.status, row.attempts, row.epoch, row.reason) == ("pending", 0, LATER, "")
    assert fold(row, failed(6)) == row


@pytest.mark.parametrize("late", [mx_failed(9), mx_failed(1 << 31), deferred(9, "validator")])
@pytest.mark.parametrize("outcome", [deferred(1), deferred(1, in_doubt=True), failed(1), sent(1)])
def test_once_the_sender_has_the_task_the_validators_verdicts_change_nothing(
    outcome: Event, late: Event
) -> None:
    row = folded([created(), mx_ok(), outcome])
    assert fold(row, late) == row
    assert folded([late, outcome, mx_ok(), created()]) == row
    # A verdict of a later epoch counts, unless the mail was sent.
    again = fold(fold(row, created(LATER)), mx_failed(1, LATER))
    assert again.status == ("completed" if isinstance(outcome, pb.MailSent) else "failed")


def test_the_validators_failure_outranks_its_success() -> None:
    for attempts in ((1, 1), (2, 1), (1 << 31, 1), (1 << 31, 1 << 31)):
        events = [created(), mx_ok(attempts[0]), mx_failed(attempts[1])]
        assert folded(events).status == folded(events[::-1]).status == "failed"


def test_a_cancellation_keeps_the_attempts_that_were_made() -> None:
    row = folded([created(), mx_ok(), deferred(2), cancelled()])
    assert (row.status, row.attempts, row.next_attempt_at) == ("cancelled", 2, None)
    later = pb.TaskCancelled(id=ID, epoch=LATER, attempts=3, at_us=AT + 9)
    row = fold(row, later)
    assert (row.status, row.attempts, row.epoch) == ("cancelled", 3, LATER)


def test_what_later_events_bring_first_is_completed_by_the_mail() -> None:
    row = folded([deferred(1, reason="greylisted", reply="450 wait", next_attempt_at_us=AT + 9)])
    assert (row.recipient, row.created_at, row.reason) == (None, None, "greylisted")
    assert row.next_attempt_at == from_micros(AT + 9)
    row = fold(row, created())
    assert (row.recipient, row.subject) == (TASK.email, TASK.subject)
    assert (row.idempotency_key, row.request_hash) == (b"key 0 ", TASK.request_hash)
    assert row.labels == '{"a":"\\u00e9","team":"blue"}'
    assert (row.created_at, row.status) == (from_micros(TASK.created_at_us), "processing")


def test_a_missing_idempotency_key_is_none_for_the_unique_index() -> None:
    row = delta(pb.TaskCreated(task=mail_task(1, full=False)))
    assert (row.idempotency_key, row.request_hash, row.labels) == (None, None, None)


@pytest.mark.parametrize("micros", [0, 1, 999_999, AT, AT + 1, 253_402_300_799_000_000])
def test_times_are_exact(micros: int) -> None:
    assert to_micros(from_micros(micros)) == micros


def test_times_out_of_range_are_clamped() -> None:
    assert from_micros(-5) == datetime(1970, 1, 1)
    assert from_micros((1 << 63) - 1).year == 9999


def test_a_scheduled_task_waits_for_its_time_until_more_is_known_of_it() -> None:
    first = pb.TaskCreated(task=TASK, at_us=AT, send_at_us=AT + 7)
    row = delta(first)
    assert (row.status, row.next_attempt_at) == ("pending", from_micros(AT + 7))
    for event, _ in LIFE[1:]:
        assert fold(row, event).next_attempt_at is None
    # A task that is reopened before its due time still waits for it.
    row = delta(pb.TaskCreated(task=TASK, epoch=LATER, at_us=AT, send_at_us=AT + 7))
    assert row.next_attempt_at == from_micros(AT + 7)


@without_deadline
@given(events_of(TASK))
def test_texts_fit_their_columns(event: Event) -> None:
    for column, value in zip(tasks.columns, delta(event), strict=True):
        length = getattr(column.type, "length", None)
        assert value is None or length is None or len(value) <= length


@without_deadline
@given(histories(1, 12), st.randoms(use_true_random=False))
def test_any_order_with_duplicates_folds_to_one_row(events: list[Event], rng: random.Random) -> None:
    once = distinct(events, version)
    again = [*once, *rng.choices(once, k=rng.randrange(8))]
    rng.shuffle(again)
    assert folded(again) == folded(once)


@without_deadline
@given(st.lists(events_of(TASK), min_size=3, max_size=3))
def test_merge_is_associative_commutative_and_idempotent(events: list[Event]) -> None:
    rows = [delta(event) for event in distinct(events, version)]
    a, b, c = (rows * 3)[:3]
    assert merge(a, a) == a
    assert merge(a, b) == merge(b, a)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


@without_deadline
@given(st.lists(events_of(TASK), min_size=1, max_size=8), st.integers(0, 7))
def test_parts_that_are_folded_apart_merge_to_the_whole(events: list[Event], cut: int) -> None:
    events = distinct(events, version)
    left, right = events[:cut], events[cut:]
    if left and right:
        assert merge(folded(left), folded(right)) == folded(events)


def fits(event: Event) -> bool:
    """Return whether its attempt fits into a version: greater attempts share one version."""
    return max(getattr(event, "attempt", 0), getattr(event, "attempts", 0)) < 1 << 14


@without_deadline
@given(st.lists(events_of(TASK).filter(fits), min_size=2, max_size=8))
def test_of_two_events_of_one_version_the_first_stays(events: list[Event]) -> None:
    assert folded(events) == folded(distinct(events, version))
