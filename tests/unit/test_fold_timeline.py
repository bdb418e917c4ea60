"""The timeline: the entry of each event."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from postroad.v1 import events_pb2 as pb
from services.common.database.tables import task_events
from services.common.database.times import from_micros
from services.common.events import Event, event_key
from services.common.timeline import TimelineRow, timeline_row
from tests.event_strategies import events_of, mail_task

TASK = mail_task(0)
ID = TASK.id


def test_an_entry_has_the_columns_of_its_table_in_their_order() -> None:
    assert TimelineRow._fields == tuple(task_events.columns.keys())


@pytest.mark.parametrize(
    ("event", "stage", "kind", "attempt", "detail"),
    [
        (pb.TaskCreated(task=TASK), "api", "created", 0, ""),
        (pb.TaskCreated(task=TASK, epoch=5), "api", "retried", 0, ""),
        (
            pb.MxOk(
                task=TASK,
                attempt=2,
                hosts=[pb.MailHost(name="a.test"), pb.MailHost(preference=9, name="b.test")],
            ),
            "validator",
            "mx_ok",
            2,
            "a.test, b.test",
        ),
        (
            pb.MxFailed(id=ID, attempt=1, reason="null_mx", detail="takes no mail"),
            "validator",
            "mx_failed",
            1,
            "null_mx: takes no mail",
        ),
        (pb.MxFailed(id=ID, attempt=1, reason="null_mx"), "validator", "mx_failed", 1, "null_mx"),
        (pb.MailSent(id=ID, attempt=3, message_id="<m@x>"), "sender", "sent", 3, "<m@x>"),
        (
            pb.MailDeferred(id=ID, attempt=1, stage="validator", reason="dns_unavailable"),
            "validator",
            "deferred",
            1,
            "dns_unavailable",
        ),
        (
            pb.MailDeferred(id=ID, attempt=2, stage="sender", reason="greylisted"),
            "sender",
            "deferred",
            2,
            "greylisted",
        ),
        (
            pb.MailDeferred(
                id=ID, attempt=2, stage="sender", in_doubt=True, reason="lost_reply", message_id="<m@x>"
            ),
            "sender",
            "in_doubt",
            2,
            "lost_reply: <m@x>",
        ),
        (
            pb.MailDeferred(id=ID, attempt=2, stage="sender", in_doubt=True, message_id="<m@x>"),
            "sender",
            "in_doubt",
            2,
            "<m@x>",
        ),
        (
            pb.MailFailed(id=ID, attempt=2, reason="held", uncertain=True, message_id="<m@x>"),
            "sender",
            "in_doubt",
            2,
            "held: <m@x>",
        ),
        (pb.MailFailed(id=ID, attempt=2, reason="rejected"), "sender", "failed", 2, "rejected"),
        (pb.TaskCancelled(id=ID), "api", "cancelled", 0, ""),
        (pb.TaskCancelled(id=ID, epoch=7, attempts=3), "api", "cancelled", 3, ""),
    ],
)
def test_every_event_has_its_entry(event: Event, stage: str, kind: str, attempt: int, detail: str) -> None:
    entry = timeline_row(event)
    assert (entry.stage, entry.kind, entry.attempt, entry.detail) == (stage, kind, attempt, detail)
    assert (entry.task_id, entry.event_id) == (ID, event_key(event))


def test_an_entry_has_time_relay_and_reply() -> None:
    entry = timeline_row(
        pb.MailFailed(id=ID, relay="mx.test:25", reply="550 no", at_us=1_763_976_543_123_456)
    )
    assert (entry.relay, entry.reply) == ("mx.test:25", "550 no")
    assert entry.at == from_micros(1_763_976_543_123_456)


@pytest.mark.parametrize(
    ("event", "next_at_us"),
    [
        (pb.TaskCreated(task=TASK, send_at_us=7), 7),
        (pb.TaskCreated(task=TASK), 0),
        (pb.TaskCreated(task=TASK, epoch=5, send_at_us=7), 7),
        (pb.TaskCreated(task=TASK, epoch=5), 0),
        (pb.MailDeferred(id=ID, attempt=1, stage="validator", next_attempt_at_us=8), 8),
        (pb.MailDeferred(id=ID, attempt=1, stage="sender", next_attempt_at_us=9), 9),
        (pb.MailDeferred(id=ID, attempt=1, stage="sender", in_doubt=True), 0),
        (pb.MailFailed(id=ID, attempt=1), 0),
    ],
)
def test_an_entry_has_the_time_of_the_next_attempt(event: Event, next_at_us: int) -> None:
    assert timeline_row(event).next_attempt_at == (from_micros(next_at_us) if next_at_us else None)


@settings(deadline=None)
@given(events_of(TASK))
def test_texts_fit_their_columns(event: Event) -> None:
    for column, value in zip(task_events.columns, timeline_row(event), strict=True):
        length = getattr(column.type, "length", None)
        assert value is None or length is None or len(value) <= length
