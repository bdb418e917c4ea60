"""The outbox: which events must still be published. SQL only; every function blocks.

Times are the database's own, so that replicas with different clocks agree on what is due.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple, TypeAlias

from sqlalchemy import Connection

from postroad.v1 import events_pb2 as pb
from services.common.database.bulk import execute_rows, placeholders
from services.common.unpublished import LEASE

__all__ = [
    "CANCELLED",
    "CREATED",
    "GRACE",
    "LEASE",
    "OUTCOME",
    "Decided",
    "Item",
    "cancelled",
    "created",
    "defer",
    "delete",
    "hasten",
    "item_of",
    "next_due",
    "outcome",
    "put",
    "schedule",
    "send_at",
    "take",
]

GRACE = 10
"""Seconds that the relay of the replica that recorded a task has before a sweeper looks at it."""

CREATED = "created"
"""The kind of a TaskCreated: the first one, or a later epoch's, which reopens the task."""
CANCELLED = "cancelled"
"""The kind of a TaskCancelled."""
OUTCOME = "outcome"
"""The kind of the MailSent or MailFailed in which an epoch ended."""

Decided: TypeAlias = pb.TaskCreated | pb.TaskCancelled | pb.MailSent | pb.MailFailed
"""An event that the api publishes."""

_PUT = "INSERT IGNORE INTO outbox (task_id, kind, epoch, available_at, due_at) VALUES"
_DUE = (
    "SELECT task_id, kind, epoch FROM outbox WHERE available_at <= UTC_TIMESTAMP(6)"
    " ORDER BY available_at LIMIT {limit} FOR UPDATE SKIP LOCKED"
)
_NEXT = (
    "SELECT TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), MIN(available_at)) FROM outbox"
    " WHERE available_at <= UTC_TIMESTAMP(6) + INTERVAL {us} MICROSECOND"
)


class Item(NamedTuple):
    """A row of the outbox, without its time."""

    task_id: bytes
    kind: str
    epoch: int


def created(task_id: bytes, epoch: int = 0) -> Item:
    """Return the item that stands for a task's first event, or for the one that reopens it."""
    return Item(task_id, CREATED, epoch)


def cancelled(task_id: bytes, epoch: int) -> Item:
    """Return the item that stands for the event that cancels a task."""
    return Item(task_id, CANCELLED, epoch)


def outcome(task_id: bytes, epoch: int) -> Item:
    """Return the item that stands for the outcome in which an epoch ended."""
    return Item(task_id, OUTCOME, epoch)


def item_of(event: Decided) -> Item:
    """Return the item that stands for this event."""
    if isinstance(event, pb.TaskCreated):
        return created(event.task.id, event.epoch)
    if isinstance(event, pb.TaskCancelled):
        return cancelled(event.id, event.epoch)
    return outcome(event.id, event.epoch)


def send_at(epoch: int, send_at_us: int) -> int:
    """Return when a task that was created for `send_at_us` is sent in this epoch; 0: at once.

    An epoch is the time (Unix ms) at which the task was opened again. Each who makes the event must find the
    same: the api when it reopens the task, and the sweeper.
    """
    return send_at_us if send_at_us > epoch * 1000 else 0


def put(connection: Connection, items: Sequence[Item], seconds: int = GRACE) -> None:
    """Add items, due now, which a sweeper may take `seconds` from now. Items already there stay."""
    due = f"UTC_TIMESTAMP(6) + INTERVAL {seconds:d} SECOND,UTC_TIMESTAMP(6)"
    for start in range(0, len(items), 500):
        part = items[start : start + 500]
        rows = ",".join([f"(%s,%s,%s,{due})"] * len(part))
        connection.exec_driver_sql(f"{_PUT} {rows}", tuple(value for item in part for value in item))


def schedule(connection: Connection, items: Sequence[tuple[Item, datetime]]) -> None:
    """Add items, each due at its time (naive UTC); those that stand there already stay as they are."""
    execute_rows(connection, _PUT, [(*item, due, due) for item, due in items])


def delete(connection: Connection, items: Sequence[Item]) -> None:
    """Remove items that were published; those that are gone already are no error."""
    for (kind, epoch), ids in _by_event(items):
        connection.exec_driver_sql(
            f"DELETE FROM outbox WHERE task_id IN ({placeholders(len(ids))}) AND kind = %s AND epoch = %s",
            (*ids, kind, epoch),
        )


def take(connection: Connection, limit: int) -> list[Item]:
    """Return up to `limit` items whose turn it is; the next sweeper may take them only after LEASE.

    What another sweeper is taking at the same moment is passed over. To be committed at once.
    """
    items = [Item(*row) for row in connection.exec_driver_sql(_DUE.format(limit=limit)).all()]
    defer(connection, items, LEASE)
    return items


def next_due(connection: Connection, within: float) -> float:
    """Return the seconds until an item is due, `within` where none is before that.

    To follow a `take` that took all: what is due still, another sweeper has in hand, and less than 0 is said.
    """
    us = connection.exec_driver_sql(_NEXT.format(us=int(within * 1e6))).scalar()
    return within if us is None else us / 1e6


def defer(connection: Connection, items: Sequence[Item], seconds: int) -> None:
    """Leave items to the sweeper that comes `seconds` from now; since when they are due stays."""
    for (kind, epoch), ids in _by_event(items):
        connection.exec_driver_sql(
            f"UPDATE outbox SET available_at = UTC_TIMESTAMP(6) + INTERVAL {seconds:d} SECOND"
            f" WHERE task_id IN ({placeholders(len(ids))}) AND kind = %s AND epoch = %s",
            (*ids, kind, epoch),
        )


def hasten(connection: Connection, task_id: bytes) -> None:
    """Make due now what of the task was scheduled; what a relay or a sweeper has in hand stays as it is."""
    connection.exec_driver_sql(
        "UPDATE outbox SET available_at = UTC_TIMESTAMP(6), due_at = UTC_TIMESTAMP(6) WHERE task_id = %s"
        f" AND available_at > UTC_TIMESTAMP(6) + INTERVAL {LEASE} SECOND",
        (task_id,),
    )


def _by_event(items: Sequence[Item]) -> Iterator[tuple[tuple[str, int], list[bytes]]]:
    """Yield the task ids, sorted, of each kind and epoch: lists that the primary key serves as ranges."""
    found: dict[tuple[str, int], list[bytes]] = {}
    for task_id, kind, epoch in sorted(items):
        found.setdefault((kind, epoch), []).append(task_id)
    yield from found.items()
