"""Resolve: an operator decides whether an uncertain task's mail was sent. SQL; blocks."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection

from postroad.v1 import events_pb2 as pb
from postroad.v1 import task_pb2
from services.api import locked_task, outbox
from services.api.locked_task import LockedTask
from services.common.deliveries.decide import IN_DOUBT, NO_OWNER, NOT_SENT, Delivery
from services.common.deliveries.operator_rows import resolved_row
from services.common.deliveries.row_events import event_of
from services.common.deliveries.rows import insert_row, store_rows

__all__ = ["NotResolvable", "Resolved", "close", "delivery_of", "resolve", "waits_for_operator"]

_NEVER = datetime(1970, 1, 1)


class Resolved(NamedTuple):
    """The task after the call, and the event to publish; no event where it was already resolved so."""

    task: task_pb2.Task
    event: pb.MailSent | pb.MailFailed | None


class NotResolvable(NamedTuple):
    """The call changed nothing: the task is not uncertain, and nobody resolved it so before."""

    status: str


def resolve(
    connection: Connection, tenant: str, id_: bytes, *, sent: bool, owner: bytes, now_us: int
) -> Resolved | NotResolvable | None:
    """Record that an uncertain task's mail was sent, or that it was not.

    `owner` is an owner token that no claim has. Repeated with the same token, the call changes nothing more.
    Returns None where this tenant has no such task.
    """
    task = locked_task.lock_task(connection, tenant, id_)
    if task is None:
        return None
    if not waits_for_operator(task):
        delivery = task.delivery
        not_sent = delivery is not None and delivery.reason == NOT_SENT and task.status == "failed"
        if task.status == "completed" if sent else not_sent:
            return Resolved(locked_task.view(connection, id_), None)
        return NotResolvable("processing" if task.held_by_sender else task.status)
    new = resolved_row(delivery_of(id_, task), sent, task.next_epoch(now_us // 1000), owner, now_us)
    if not close(connection, task, new):
        return NotResolvable("processing")
    event = event_of(new)
    assert isinstance(event, pb.MailSent | pb.MailFailed)
    locked_task.fold_events(connection, event)
    outbox.put(connection, [outbox.row_of(event)])
    return Resolved(locked_task.view(connection, id_), event)


def waits_for_operator(task: LockedTask) -> bool:
    """Return whether the task waits for an operator."""
    return task.status == "uncertain" and not task.held_by_sender


def close(connection: Connection, task: LockedTask, new: Delivery) -> bool:
    """Store the new delivery of an uncertain task; return False where a sender has claimed it meanwhile.

    The sender may have died before it published the doubt, and the old delivery alone proves it. The outbox
    therefore publishes the old epoch's outcome too.
    """
    if task.delivery is None:
        return insert_row(connection, new)
    store_rows(connection, [new])
    outbox.put(connection, [outbox.outcome(task.delivery.task_id, task.delivery.epoch)])
    return True


def delivery_of(id_: bytes, task: LockedTask) -> Delivery:
    """Return the task's delivery; build one from the task's row where it was lost."""
    if task.delivery is not None:
        return task.delivery
    attempt = max(1, task.attempts)
    return Delivery(id_, "uncertain", task.epoch, attempt, 0, NO_OWNER, _NEVER, 0, 0, IN_DOUBT, "", "", "", 0)
