"""Resolve: an operator says what became of an uncertain task's mail. SQL; it blocks."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection

from postroad.v1 import events_pb2 as pb
from postroad.v1 import task_pb2
from services.api import outbox, standing
from services.api.standing import Standing
from services.common.deliveries.decide import IN_DOUBT, NO_OWNER, NOT_SENT, Delivery
from services.common.deliveries.outcome import event_of
from services.common.deliveries.resolving import resolved_row
from services.common.deliveries.rows import insert_row, store_rows

__all__ = ["Resolution", "Unresolved", "close", "in_doubt", "resolve", "row_of"]

_NEVER = datetime(1970, 1, 1)


class Resolution(NamedTuple):
    """How the task stands, and what is to be published: None where it was resolved so before."""

    task: task_pb2.Task
    event: pb.MailSent | pb.MailFailed | None


class Unresolved(NamedTuple):
    """The task stays as it is: it is not uncertain, and was not resolved so either."""

    status: str


def resolve(
    connection: Connection, tenant: str, id_: bytes, *, sent: bool, owner: bytes, now_us: int
) -> Resolution | Unresolved | None:
    """Record that an uncertain task's mail was sent, or was not. None: this tenant has no such task.

    `owner` is a token that no claim has. Done twice, it changes nothing more.
    """
    found = standing.find(connection, tenant, id_)
    if found is None:
        return None
    if not in_doubt(found):
        row = found.row
        not_sent = row is not None and row.reason == NOT_SENT and found.status == "failed"
        if found.status == "completed" if sent else not_sent:
            return Resolution(standing.view(connection, id_), None)
        return Unresolved("processing" if found.in_hand else found.status)
    row = resolved_row(row_of(id_, found), sent, found.next_epoch(now_us // 1000), owner, now_us)
    if not close(connection, found, row):
        return Unresolved("processing")
    event = event_of(row)
    assert isinstance(event, pb.MailSent | pb.MailFailed)
    standing.record(connection, event)
    outbox.put(connection, [outbox.item_of(event)])
    return Resolution(standing.view(connection, id_), event)


def in_doubt(found: Standing) -> bool:
    """Return whether the task waits for an operator."""
    return found.status == "uncertain" and not found.in_hand


def close(connection: Connection, found: Standing, row: Delivery) -> bool:
    """Write the delivery; return False where it had no row and a sender has come between.

    The row was all that could tell of the doubt again, had its sender died before it did: that goes out too.
    """
    if found.row is None:
        return insert_row(connection, row)
    store_rows(connection, [row])
    outbox.put(connection, [outbox.outcome(found.row.task_id, found.row.epoch)])
    return True


def row_of(id_: bytes, found: Standing) -> Delivery:
    """Return the task's delivery, made anew where it was lost."""
    if found.row is not None:
        return found.row
    attempt = max(1, found.attempts)
    return Delivery(
        id_, "uncertain", found.epoch, attempt, 0, NO_OWNER, _NEVER, 0, 0, IN_DOUBT, "", "", "", 0
    )
