"""Cancel: takes the task's delivery by the same rule by which a sender claims it. SQL; blocks.

A cancellation begins an epoch later than all known ones. Work in progress of an earlier epoch (a verdict on
the domain, a replayed record) therefore cannot overrule it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import Connection

from postroad.v1 import events_pb2 as pb
from postroad.v1 import task_pb2
from services.api import locked_task, outbox, resolving
from services.api.locked_task import LockedTask
from services.common.deliveries.decide import Cancel, Delivery, Wait, decide
from services.common.deliveries.operator_rows import cancelled_row
from services.common.deliveries.row_events import event_of
from services.common.deliveries.rows import insert_row, store_rows
from services.common.statuses import FINAL_STATUSES

__all__ = ["Cancelled", "attempts", "cancel", "may_still_be_sent"]


class Cancelled(NamedTuple):
    """The task after the call, and the event to publish; no event where the call changed nothing."""

    task: task_pb2.Task
    event: pb.TaskCancelled | None


def cancel(
    connection: Connection, tenant: str, id_: bytes, owner: bytes, now_us: int
) -> Cancelled | Wait | None:
    """Cancel a task of which nothing was sent, or close an uncertain one.

    `owner` is an owner token that no claim has. Repeated with the same token, the call changes nothing more.
    Returns None where this tenant has no such task, and Wait where the caller must ask again later.
    """
    task = locked_task.lock_task(connection, tenant, id_)
    if task is None:
        return None
    # A repeated call, whose first commit went unnoticed, must not close the doubt that it itself recorded.
    doubtful = resolving.waits_for_operator(task) and (task.delivery is None or task.delivery.owner != owner)
    if not doubtful and not may_still_be_sent(task):
        return Cancelled(locked_task.view(connection, id_), None)
    request = Cancel(id_, task.next_epoch(now_us // 1000), owner)
    claim = _close if doubtful else _claim
    delivery = claim(connection, task, request)
    if isinstance(delivery, Wait):
        return delivery
    event = pb.TaskCancelled(
        id=id_, epoch=request.epoch, at_us=now_us, attempts=attempts(task), in_doubt=doubtful
    )
    # A sender that meets the cancellation reads this row, and reports the mail that is in doubt.
    doubt = [event_of(delivery)] if delivery.state == "uncertain" else []
    locked_task.fold_events(connection, event, *doubt)
    outbox.put(connection, [outbox.row_of(event)])
    # The topics get every event of a task, so the first event of a scheduled task is due now as well.
    outbox.make_due(connection, id_)
    return Cancelled(locked_task.view(connection, id_), event)


def may_still_be_sent(task: LockedTask) -> bool:
    """Return whether a sender may still send the mail. The delivery overrules the task's row."""
    if task.delivery is not None and task.delivery.state in ("sending", "released", "deferred"):
        return True
    return task.status not in FINAL_STATUSES


def attempts(task: LockedTask) -> int:
    """Return the SMTP attempts of the task's present epoch, with those that are not folded yet."""
    delivery = task.delivery
    if delivery is not None and delivery.state == "deferred" and delivery.epoch >= task.epoch:
        return max(task.attempts, delivery.attempt)
    return task.attempts


def _claim(connection: Connection, task: LockedTask, request: Cancel) -> Delivery | Wait:
    """Store and return the cancelled delivery; return Wait while a sender has the task."""
    # The rule reads neither a lease nor the policy for mails in doubt when a Cancel asks.
    answer, new = decide(task.delivery, request, task.now, timedelta(0), hold=True)
    if isinstance(answer, Wait):
        return answer
    # The caller has excluded mails that were sent, and a final delivery has an earlier epoch.
    assert new is not None, answer
    if task.delivery is not None:
        store_rows(connection, [new])
    elif not insert_row(connection, new):
        # A sender has added its claim meanwhile. A new transaction will read it.
        return Wait(0)
    return new


def _close(connection: Connection, task: LockedTask, request: Cancel) -> Delivery | Wait:
    """Store and return the closed delivery of an uncertain task."""
    delivery = cancelled_row(resolving.delivery_of(request.task_id, task), request.epoch, request.owner)
    return delivery if resolving.close(connection, task, delivery) else Wait(0)
