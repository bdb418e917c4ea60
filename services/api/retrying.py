"""Retry: a task that ended without its mail begins a later epoch. SQL; blocks.

Retry does not write the delivery. Its rule (decide.py) lets a sender claim the later epoch, and never a mail
that was sent, whatever the epoch.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection

from postroad.v1 import events_pb2 as pb
from postroad.v1 import task_pb2
from services.api import locked_task, outbox
from services.common import taskstore
from services.common.database.times import from_micros
from services.common.statuses import NOT_COMPLETED

__all__ = ["NotRetryable", "Retried", "retry"]


class Retried(NamedTuple):
    """The task after the call, and the event to publish."""

    task: task_pb2.Task
    event: pb.TaskCreated


class NotRetryable(NamedTuple):
    """The call changed nothing: the task is completed or in progress, or its body was purged."""

    status: str
    purged: bool = False


def retry(
    connection: Connection, tenant: str, id_: bytes, now_ms: int, tried_epoch: int = 0
) -> Retried | NotRetryable | None:
    """Open a failed, uncertain or cancelled task again; return None where this tenant has no such task.

    A `send_at` in the future still holds: the event is due then, not now.

    `tried_epoch` is the epoch that an earlier run of the same call chose, 0 for none. Its connection may have
    died after the commit, so a task in that epoch is this call's own work.
    """
    task = locked_task.lock_task(connection, tenant, id_)
    if task is None:
        return None
    if task.held_by_sender:
        # The validator's late verdict may hide this in the row until the attempt ends.
        return NotRetryable("processing")
    again = task.status == "pending" and task.epoch == tried_epoch > 0
    if task.status not in NOT_COMPLETED and not again:
        return NotRetryable(task.status)
    # The lock on the row keeps the purge away from the body.
    mail = taskstore.load_tasks(connection, [id_])[id_]
    if not mail.HasField("body") and not mail.HasField("html"):
        return NotRetryable(task.status, purged=True)
    epoch = tried_epoch if again else task.next_epoch(now_ms)
    send_at_us = outbox.send_at(epoch, taskstore.send_times(connection, [id_]).get(id_, 0))
    event = pb.TaskCreated(task=mail, epoch=epoch, at_us=epoch * 1000, send_at_us=send_at_us)
    locked_task.fold_events(connection, event)
    if send_at_us:
        outbox.insert_scheduled(connection, [(outbox.row_of(event), from_micros(send_at_us))])
    else:
        outbox.put(connection, [outbox.row_of(event)])
    return Retried(locked_task.view(connection, id_), event)
