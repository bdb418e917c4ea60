"""The claims know a task that the validator failed: the rule and its SQL, on each database server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import product
from typing import get_args

import pytest
from sqlalchemy import Engine

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import IN_DOUBT, Claim, Delivery, DeliveryState, Settled, Taken, decide
from services.common.deliveries.mx_failures import failed_row, merge_failure, store_failures
from services.common.deliveries.row_events import event_of, failed_before_sender
from services.common.deliveries.rows import lock_rows, store_rows
from services.common.events import Event
from services.common.fold import delta
from services.common.stage.types import Done
from services.common.taskstore import upsert
from services.sender.claims import Claims
from services.sender.outcome_of_record import outcome_of_record
from tests.event_strategies import mail_task

NOW = datetime(2026, 3, 1, 12)
EPOCH = 5


def failed(id_: bytes, epoch: int = EPOCH, reason: str = "null_mx") -> pb.MxFailed:
    return pb.MxFailed(id=id_, epoch=epoch, attempt=3, reason=reason, detail="d", at_us=77)


def known() -> Iterator[Delivery]:
    """A row of any state, epoch and reason that the rule distinguishes."""
    cases = product(get_args(DeliveryState), (EPOCH - 1, EPOCH, EPOCH + 1), ("", IN_DOUBT, "rejected"))
    for number, (state, epoch, reason) in enumerate(cases):
        yield Delivery(
            number.to_bytes(16, "big"),
            state,
            epoch,
            2,
            1,
            b"o" * 16,
            NOW,
            9,
            8,
            reason,
            "r",
            "relay",
            "<m@x>",
        )


def test_the_sql_is_the_rule(engine: Engine) -> None:
    rows = list(known())
    new = b"new" + bytes(13)
    with engine.begin() as connection:
        store_rows(connection, rows)
        for _ in range(2):
            store_failures(connection, [failed(new), *(failed(row.task_id) for row in reversed(rows))])
        found, _ = lock_rows(connection, [new, *(row.task_id for row in rows)])
    assert found[new] == failed_row(failed(new))
    for row in rows:
        assert found[row.task_id] == merge_failure(row, failed_row(failed(row.task_id))), row
    assert sum(found[row.task_id] != row for row in rows) == 9, "settled ones of an earlier epoch, no others"


@pytest.mark.parametrize(
    ("doubts_in_all", "attempt", "state", "epoch", "becomes_failed"),
    [
        (0, 1, "released", EPOCH, True),
        (0, 2, "released", EPOCH, False),
        (1, 1, "released", EPOCH, False),
        (0, 1, "released", EPOCH - 1, False),
        (0, 1, "released", EPOCH + 1, False),
        (0, 1, "sending", EPOCH, False),
        (0, 1, "deferred", EPOCH, False),
    ],
)
def test_a_claim_released_without_an_attempt_does_not_count(
    engine: Engine,
    *,
    attempt: int,
    doubts_in_all: int,
    state: DeliveryState,
    epoch: int,
    becomes_failed: bool,
) -> None:
    id_ = b"y" * 16
    row = next(known())._replace(
        task_id=id_, state=state, epoch=epoch, attempt=attempt, doubts_in_all=doubts_in_all, reason=""
    )
    with engine.begin() as connection:
        store_rows(connection, [row])
        store_failures(connection, [failed(id_)])
        found, _ = lock_rows(connection, [id_])
    assert found[id_] == merge_failure(row, failed_row(failed(id_)))
    assert (found[id_] != row) == becomes_failed == failed_before_sender(found[id_])


@pytest.mark.parametrize("first", ["claim", "verdict"])
def test_the_first_to_write_decides_and_the_status_agrees(engine: Engine, first: str) -> None:
    task = mail_task(0)
    claims, claim = Claims(engine, 20, hold=False), Claim(task.id, 0, 1, b"c" * 16, "<m@x>")
    verdicts = [pb.TaskCreated(task=task), pb.MxOk(task=task, attempt=1)]
    late = [pb.MxFailed(id=task.id, attempt=1, reason="no_such_domain")]
    events: list[Event] = [*verdicts, *late]
    if first == "verdict":
        with engine.begin() as connection:
            store_failures(connection, late)
    [answered] = claims.claim([claim])
    if first == "verdict":
        assert isinstance(answered, Settled)
        assert outcome_of_record(answered.row, [60], 0) == Done()
        ends = "failed"
    else:
        assert isinstance(answered, Taken)
        deferred = answered.row._replace(state="deferred", reason="greylisted", next_attempt_at=1)
        claims.store([deferred])
        with engine.begin() as connection:
            store_failures(connection, late)
        events.append(event_of(deferred))
        # The sender still gets the next attempt.
        [again] = claims.claim([claim._replace(attempt=2, owner=b"d" * 16)])
        assert isinstance(again, Taken)
        ends = "processing"
    with engine.begin() as connection:
        upsert(connection, map(delta, events))
        upsert(connection, map(delta, late))
        status = connection.exec_driver_sql("SELECT status FROM tasks").scalar_one()
    assert status == ends


def test_the_latest_of_several_epochs_counts(engine: Engine) -> None:
    id_ = b"x" * 16
    with engine.begin() as connection:
        store_failures(connection, [])
        store_failures(connection, [failed(id_, 1), failed(id_, 9, "x" * 99), failed(id_, 4)])
        found, _ = lock_rows(connection, [id_])
    assert (found[id_].epoch, found[id_].reason) == (9, "x" * 64)


@pytest.mark.parametrize("hold", [True, False])
def test_a_claim_of_its_epoch_is_answered_and_one_of_a_later_epoch_may_send(hold: bool) -> None:
    row = failed_row(failed(b"x" * 16))

    def ask(epoch: int) -> object:
        return decide(row, Claim(row.task_id, epoch, 1, b"c" * 16, "<m@x>"), NOW, timedelta(20), hold)[0]

    assert ask(EPOCH) == Settled(row)
    later = ask(EPOCH + 1)
    assert isinstance(later, Taken)
    assert later.row.message_id == "<m@x>"
    assert later.row.doubts_in_all == 0


def test_the_row_keeps_that_a_mail_was_ever_in_doubt() -> None:
    row = next(row for row in known() if (row.state, row.epoch, row.reason) == ("uncertain", 4, IN_DOUBT))
    over = merge_failure(row, failed_row(failed(row.task_id)))
    assert (over.state, over.doubts_in_all, over.message_id) == ("failed", 2, "<m@x>")


def test_the_sender_publishes_nothing_of_a_task_that_it_never_claimed(engine: Engine) -> None:
    event = failed(b"x" * 16)
    with engine.begin() as connection:
        store_failures(connection, [event])
    [answer] = Claims(engine, 20, hold=False).claim([Claim(event.id, EPOCH, 1, b"c" * 16, "<m@x>")])
    assert isinstance(answer, Settled)
    assert outcome_of_record(answer.row, [60], 0) == Done()
    # A failure of the sender's own is published again.
    settled = answer.row._replace(attempt=1, reason="rejected")
    assert not failed_before_sender(settled)
    assert outcome_of_record(settled, [60], 0) == Done([event_of(settled)])
