"""Retry: a task that ended without its mail begins anew, in a later epoch. SQL; it blocks.

The delivery stays as it is: it is the later epoch that the claim takes for a wish to send (decide.py), and a
mail that went out is `sent` in every epoch.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection

from postroad.v1 import events_pb2 as pb
from postroad.v1 import task_pb2
from services.api import outbox, standing
from services.common import taskstore
from services.common.database.times import from_micros

__all__ = ["Refusal", "Reopened", "reopen"]


class Reopened(NamedTuple):
    """How the task stands, and what is to be published."""

    task: task_pb2.Task
    event: pb.TaskCreated


class Refusal(NamedTuple):
    """The task stays as it is: it is completed or under way, or (`purged`) its text is gone."""

    status: str
    purged: bool = False


def reopen(
    connection: Connection, tenant: str, id_: bytes, now_ms: int, tried: int = 0
) -> Reopened | Refusal | None:
    """Open a task again if it is failed, uncertain or cancelled. None: this tenant has no such task.

    A `send_at` that has not come yet still holds: the event is due then, not now.

    `tried`: the epoch that an earlier run of the same call chose, if any. Its connection may have died after
    the commit; a task that stands in that epoch is then the work of this call.
    """
    found = standing.find(connection, tenant, id_)
    if found is None:
        return None
    if found.in_hand:
        # A late verdict of the validator may hide this until the attempt has told how it ended.
        return Refusal("processing")
    again = found.status == "pending" and found.epoch == tried > 0
    if found.status not in ("failed", "uncertain", "cancelled") and not again:
        return Refusal(found.status)
    # As its row is locked, nobody purges its body meanwhile.
    task = taskstore.load_tasks(connection, [id_])[id_]
    if not task.HasField("body") and not task.HasField("html"):
        return Refusal(found.status, purged=True)
    epoch = tried if again else found.next_epoch(now_ms)
    send_at_us = outbox.send_at(epoch, taskstore.send_times(connection, [id_]).get(id_, 0))
    event = pb.TaskCreated(task=task, epoch=epoch, at_us=epoch * 1000, send_at_us=send_at_us)
    standing.record(connection, event)
    if send_at_us:
        outbox.schedule(connection, [(outbox.item_of(event), from_micros(send_at_us))])
    else:
        outbox.put(connection, [outbox.item_of(event)])
    return Reopened(standing.view(connection, id_), event)
