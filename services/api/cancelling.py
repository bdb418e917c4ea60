"""Cancel: decided by the row in `deliveries`, by the rule by which a sender takes it. SQL; it blocks.

A cancellation has an epoch of its own, later than all that is known of the task. What is under way of it (a
verdict on its domain, a record that was replayed) is of an earlier one: it cannot overrule what was answered.
"""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import Connection

from postroad.v1 import events_pb2 as pb
from postroad.v1 import task_pb2
from services.api import outbox, resolving, standing
from services.api.standing import OVER, Standing
from services.common.deliveries.decide import Cancel, Delivery, Wait, decide
from services.common.deliveries.outcome import event_of
from services.common.deliveries.resolving import cancelled_row
from services.common.deliveries.rows import insert_row, store_rows

__all__ = ["Cancelled", "alive", "attempts", "cancel"]


class Cancelled(NamedTuple):
    """How the task stands, and what is to be published: None where nothing was changed."""

    task: task_pb2.Task
    event: pb.TaskCancelled | None


def cancel(
    connection: Connection, tenant: str, id_: bytes, owner: bytes, now_us: int
) -> Cancelled | Wait | None:
    """Cancel a task if nothing of it was sent, or close an uncertain one.

    None: this tenant has no such task. Wait: ask again later. `owner` is
    a token that no claim has. Done twice, it changes nothing more.
    """
    found = standing.find(connection, tenant, id_)
    if found is None:
        return None
    # Done again after a commit that was not heard of, it does not close what itself found to be in doubt.
    doubtful = resolving.in_doubt(found) and (found.row is None or found.row.owner != owner)
    if not doubtful and not alive(found):
        return Cancelled(standing.view(connection, id_), None)
    request = Cancel(id_, found.next_epoch(now_us // 1000), owner)
    row = _closed(connection, found, request) if doubtful else _decided(connection, found, request)
    if isinstance(row, Wait):
        return row
    event = pb.TaskCancelled(
        id=id_, epoch=request.epoch, at_us=now_us, attempts=attempts(found), in_doubt=doubtful
    )
    # A sender that meets the cancellation finds the row, and tells of a mail in doubt.
    doubt = [event_of(row)] if row.state == "uncertain" else []
    standing.record(connection, event, *doubt)
    outbox.put(connection, [outbox.item_of(event)])
    # All events of a task reach the topics, and a scheduled one's first event waits for nothing any more.
    outbox.hasten(connection, id_)
    return Cancelled(standing.view(connection, id_), event)


def alive(found: Standing) -> bool:
    """Return whether anything of the task may still be sent. A delivery knows better than the task's row."""
    if found.row is not None and found.row.state in ("sending", "released", "deferred"):
        return True
    return found.status not in OVER


def attempts(found: Standing) -> int:
    """Return the SMTP attempts made in the task's present epoch, those included that were not folded yet."""
    row = found.row
    if row is not None and row.state == "deferred" and row.epoch >= found.epoch:
        return max(found.attempts, row.attempt)
    return found.attempts


def _decided(connection: Connection, found: Standing, request: Cancel) -> Delivery | Wait:
    """Return the delivery as it is written now."""
    # Neither a lease nor the policy for what is in doubt is asked for by a Cancel.
    verdict, new = decide(found.row, request, found.now, timedelta(0), hold=True)
    if isinstance(verdict, Wait):
        return verdict
    # What is sent is not alive, and what is over is of an earlier epoch.
    assert new is not None, verdict
    if found.row is not None:
        store_rows(connection, [new])
    elif not insert_row(connection, new):
        # A sender has come between; it is met anew in a transaction that has read nothing yet.
        return Wait(0)
    return new


def _closed(connection: Connection, found: Standing, request: Cancel) -> Delivery | Wait:
    """Return the delivery of an uncertain task as it is written now."""
    row = cancelled_row(resolving.row_of(request.task_id, found), request.epoch, request.owner)
    return row if resolving.close(connection, found, row) else Wait(0)
