"""The reorder buffer of Watch: in which order it releases changes, and the task's row after each."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postroad.v1 import events_pb2 as ev
from services.api.watch.changes import Change, order_in_task
from services.api.watch.reorder_buffer import (
    EXPECTED_PREDECESSOR_TIMEOUT,
    POSSIBLE_PREDECESSOR_TIMEOUT,
    ReorderBuffer,
)
from services.common.events import Event
from services.common.fold import TaskRow, delta, fold
from tests.watch_changes import MADE_MS, RETRIED, life, mail, read


def named(changes: list[Change]) -> list[str]:
    return [c.entry.event_id for c in changes]


def split(chance: random.Random, items: list[Change]) -> list[list[Change]]:
    batches: list[list[Change]] = [[]]
    for item in items:
        if chance.random() < 0.4:
            batches.append([])
        batches[-1].append(item)
    return batches


@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_changes_are_released_in_their_tasks_order_however_topics_interleave(
    chance: random.Random, tasks: int
) -> None:
    lives = [[read(event) for event in life(mail(number))] for number in range(tasks)]
    # Each topic keeps its order and may come twice. The topics interleave in any way.
    topics: dict[str, list[Change]] = {}
    for number in range(10):
        for one in lives:
            topics.setdefault(one[number].partition.topic, []).append(one[number])
    queue: list[Change] = []
    left = {name: list(changes) * chance.randint(1, 2) for name, changes in topics.items()}
    while left:
        name = chance.choice(sorted(left))
        queue.append(left[name].pop(0))
        if not left[name]:
            del left[name]
    buffer = ReorderBuffer(MADE_MS - 1)
    released = []
    for number, batch in enumerate(split(chance, queue)):
        released += buffer.add(batch, number * 0.001)
    assert buffer.next_timeout() is None
    assert not buffer.held()
    for one in lives:
        mine = [c for c in released if c.row.id == one[0].row.id]
        in_epochs = sorted(mine, key=lambda c: c.row.epoch)
        assert named(in_epochs) == named(one)
        first = [c for c in mine if not c.row.epoch]
        assert named(first) == named(one[:7])


@given(st.randoms(use_true_random=False))
def test_after_a_loss_the_rest_is_released_in_order_and_in_time(chance: random.Random) -> None:
    whole = [read(event, offset) for offset, event in enumerate(life(mail()))]
    kept = [c for c in whole if chance.random() < 0.6]
    chance.shuffle(kept)
    buffer = ReorderBuffer(MADE_MS - 1)
    released = buffer.add(kept, 0.0)
    while (timeout := buffer.next_timeout()) is not None:
        assert timeout <= EXPECTED_PREDECESSOR_TIMEOUT
        released += buffer.add([], timeout)
    assert named(released) == named(sorted(kept, key=order_in_task))


def test_a_predecessor_that_may_be_older_than_the_reading_has_a_short_timeout() -> None:
    sent = read(life(mail())[-1])
    old, new = ReorderBuffer(RETRIED), ReorderBuffer(RETRIED - 1)
    assert old.add([sent], 5.0) == new.add([sent], 5.0) == []
    assert old.next_timeout() == 5.0 + POSSIBLE_PREDECESSOR_TIMEOUT
    assert new.next_timeout() == 5.0 + EXPECTED_PREDECESSOR_TIMEOUT
    assert old.add([], 5.0 + POSSIBLE_PREDECESSOR_TIMEOUT) == [sent]
    assert old.held() == []
    assert new.held() == [(*sent.partition, sent.offset)]


def test_a_scheduled_tasks_first_events_are_expected_though_its_id_is_older() -> None:
    id_, start = mail().id, MADE_MS + 3_600_000
    now_ms = start + 30_001
    sent = read(ev.MailSent(id=id_, attempt=1, at_us=now_ms * 1000), at_ms=now_ms)
    created = read(life(mail())[0], at_ms=now_ms)
    ok = read(ev.MxOk(task=mail(), attempt=1, at_us=now_ms * 1000), at_ms=now_ms)
    buffer = ReorderBuffer(start)
    assert buffer.add([sent], 0.0) == []
    assert buffer.next_timeout() == EXPECTED_PREDECESSOR_TIMEOUT
    assert buffer.add([ok, created], 1.0) == [created, ok, sent]
    # The predecessors of an early change, and of a later attempt, may be older than the reading.
    early = sent._replace(at_ms=start + 30_000)
    again = read(ev.MailSent(id=id_, attempt=2, at_us=now_ms * 1000), at_ms=now_ms)
    cancelled = read(ev.TaskCancelled(id=id_, epoch=now_ms, at_us=now_ms * 1000), at_ms=now_ms)
    for change in (early, again, cancelled):
        buffer = ReorderBuffer(start)
        assert buffer.add([change], 0.0) == []
        assert buffer.next_timeout() == POSSIBLE_PREDECESSOR_TIMEOUT


def test_after_a_timeout_no_other_change_waits_for_the_same_predecessor() -> None:
    buffer = ReorderBuffer(MADE_MS + 1)
    first, second = (
        read(ev.MailDeferred(id=mail().id, attempt=n, stage="sender", at_us=MADE_MS * 1000)) for n in (3, 4)
    )
    assert buffer.add([first], 0.0) == []
    assert buffer.add([], POSSIBLE_PREDECESSOR_TIMEOUT) == [first]
    assert buffer.add([second], 1.0) == [second]


def test_many_held_events_of_one_task_are_released_quickly() -> None:
    id_ = mail().id
    several = [read(ev.MailDeferred(id=id_, attempt=n, stage="sender", at_us=n)) for n in range(2, 20_002)]
    buffer = ReorderBuffer(0)
    started = time.process_time()
    assert buffer.add(several, 0.0) == []
    assert buffer.add([], EXPECTED_PREDECESSOR_TIMEOUT) == several
    assert time.process_time() - started < 5


def test_no_predecessor_of_a_forgotten_task_is_expected() -> None:
    buffer = ReorderBuffer(0, max_tasks=1)
    events = life(mail())
    buffer.add([read(events[0])], 0.0)
    buffer.add([read(events[0]) for events in (life(mail(1)),)], 0.0)
    assert buffer.add([read(events[2])], 0.0) == []
    assert buffer.next_timeout() == POSSIBLE_PREDECESSOR_TIMEOUT


@pytest.mark.parametrize("start", range(10))
def test_applied_in_order_changes_give_the_row_of_the_fold(start: int) -> None:
    events = life(mail())
    row: TaskRow | None = None
    for event in events[:start]:
        row = fold(row, event)
    buffer, mails = ReorderBuffer(RETRIED + 1), delta(events[0])[1:9]
    for number, event in enumerate(events[start:]):
        row = fold(row, event)
        [ready] = [*buffer.add([read(event)], number), *buffer.add([], number + POSSIBLE_PREDECESSOR_TIMEOUT)]
        known: Any = (mails[0], None, None, *mails[3:]) if buffer.of_unknown_tasks([ready]) else None
        assert (known is None) == (number > 0 or start == 0)
        assert buffer.apply(ready, known) == row._replace(idempotency_key=None, request_hash=None)


def test_a_late_change_shows_the_task_as_it_was_then() -> None:
    buffer = ReorderBuffer(0)
    created = read(life(mail())[0])
    ok = read(ev.MxOk(task=mail(), attempt=1, at_us=0))
    failed = read(ev.MailFailed(id=mail().id, attempt=1, reason="rejected", at_us=1))
    for ready in buffer.add([created, failed], 0.0) + buffer.add([], EXPECTED_PREDECESSOR_TIMEOUT):
        buffer.apply(ready, None)
    [late] = buffer.add([ok], EXPECTED_PREDECESSOR_TIMEOUT)
    row = buffer.apply(late, None)
    assert row is not None
    assert (row.status, row.reason, row.recipient) == ("processing", "", "a0@x.test")


def test_an_event_of_an_ended_epoch_changes_nothing() -> None:
    # The cancellation of a scheduled task is published at once, its other events when they are due.
    cancelled = read(ev.TaskCancelled(id=mail().id, epoch=RETRIED, at_us=RETRIED * 1000))
    created, ok = read(life(mail())[0]), read(ev.MxOk(task=mail(), attempt=1, at_us=MADE_MS * 1000))
    buffer = ReorderBuffer(0)
    released = [
        *buffer.add([cancelled], 0.0),
        *buffer.add([], EXPECTED_PREDECESSOR_TIMEOUT),
        *buffer.add([created, ok], 60.0),
    ]
    assert named(released) == named([cancelled, created, ok])
    known: Any = delta(life(mail())[0])[1:9]
    states = [buffer.apply(c, known if c is cancelled else None) for c in released]
    assert [row and (row.status, row.epoch, row.recipient) for row in states] == [
        ("cancelled", RETRIED, "a0@x.test")
    ] * 3


@pytest.mark.parametrize(
    "late",
    [
        ev.MxFailed(id=mail().id, attempt=1, reason="no_such_domain", at_us=9),
        ev.MailDeferred(id=mail().id, attempt=1, stage="validator", at_us=9),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_late_verdict_changes_nothing_once_the_sender_has_the_task(late: Event, together: bool) -> None:
    buffer = ReorderBuffer(0)
    created, ok = read(life(mail())[0]), read(ev.MxOk(task=mail(), attempt=1, at_us=1))
    deferred = read(ev.MailDeferred(id=mail().id, attempt=1, stage="sender", reason="greylisted", at_us=2))
    batches = [[created, ok, deferred, read(late)]] if together else [[created, ok, deferred], [read(late)]]
    released = [c for number, batch in enumerate(batches) for c in buffer.add(batch, number)]
    assert len(released) == 4
    states = [buffer.apply(c, None) for c in released]
    assert "failed" not in [row and row.status for row in states]
    assert states[-1] is not None
    assert (states[-1].status, states[-1].reason) == ("processing", "greylisted")


def test_a_resolution_has_only_the_creation_as_its_predecessor() -> None:
    buffer, id_ = ReorderBuffer(0), mail().id
    events = [
        ev.MailSent(id=id_, epoch=RETRIED, attempt=1, resolved=True, at_us=1),
        ev.MailFailed(id=id_, epoch=RETRIED, attempt=1, reason="not_sent", at_us=1),
    ]
    buffer.add([read(life(mail())[0])], 0.0)
    assert named(buffer.add([read(event) for event in events], 0.0)) == named([read(e) for e in events[::-1]])


def test_a_task_of_an_unknown_tenant_has_no_row() -> None:
    buffer = ReorderBuffer(MADE_MS + 10**6)
    sent = read(life(mail())[-1])
    [ready] = [*buffer.add([sent], 0.0), *buffer.add([], 1.0)]
    assert buffer.of_unknown_tasks([ready]) == [ready]
    assert buffer.apply(ready, None) is None
    assert buffer.of_unknown_tasks([ready]) == [ready]


def test_a_task_is_unknown_only_without_its_first_event() -> None:
    buffer = ReorderBuffer(MADE_MS + 10**6)
    one, other = ([read(event) for event in life(mail(number))[:3]] for number in range(2))
    assert buffer.of_unknown_tasks([*one, *other[1:]]) == other[1:]
    replayed = one[0]._replace(replayed=True)
    assert buffer.of_unknown_tasks([replayed, one[1]]) == [replayed, one[1]]


def test_a_replay_that_reopens_a_task_is_new() -> None:
    created, reopened = life(mail())[0], life(mail())[7]
    assert read(created, replayed=True).replayed
    assert not read(reopened, replayed=True).replayed
