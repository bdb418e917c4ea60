"""The outbox table: the events that Kafka has not acknowledged yet.

Functions with a `connection` run SQL and block. All times are the database's, so that replicas with
different clocks agree on what is due.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from sqlalchemy import Connection

from postroad.v1 import events_pb2 as pb
from services.common.database.bulk import execute, execute_rows, placeholders
from services.common.database.literals import literal_list
from services.common.unpublished import SWEEP_SECONDS

__all__ = [
    "CANCELLED",
    "CREATED",
    "GRACE",
    "OUTCOME",
    "SWEEP_SECONDS",
    "ApiEvent",
    "NewTask",
    "OutboxEvent",
    "OutboxRow",
    "cancelled",
    "created",
    "defer",
    "delete",
    "insert_scheduled",
    "make_due",
    "next_due",
    "outcome",
    "put",
    "row_of",
    "send_at",
    "take",
]

GRACE = 10
"""Seconds that a new row belongs to its replica's outbox publisher. Then a sweeper may take it."""

CREATED = "created"
"""The kind of a TaskCreated, whether it is a task's first one or begins a later epoch."""
CANCELLED = "cancelled"
"""The kind of a TaskCancelled."""
OUTCOME = "outcome"
"""The kind of the MailSent or MailFailed that ended an epoch."""

ApiEvent: TypeAlias = pb.TaskCreated | pb.TaskCancelled | pb.MailSent | pb.MailFailed
"""An event that the api publishes."""

E_co = TypeVar("E_co", bound=ApiEvent, covariant=True)


@dataclass(frozen=True, slots=True)
class OutboxEvent(Generic[E_co]):
    """An event for the outbox, with the trace context of its request.

    `size` is the number of bytes that it occupies while it waits.
    """

    event: E_co
    traceparent: bytes
    size: int = 0


NewTask: TypeAlias = OutboxEvent[pb.TaskCreated]
"""A task that a Create asks for, with its id, on its way into the database."""

_PUT = "INSERT IGNORE INTO outbox (task_id, kind, epoch, available_at, due_at) VALUES"
_DUE = (
    "SELECT task_id, kind, epoch FROM outbox WHERE available_at <= UTC_TIMESTAMP(6)"
    " ORDER BY available_at LIMIT {limit} FOR UPDATE SKIP LOCKED"
)
_NEXT = (
    "SELECT TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), MIN(available_at)) FROM outbox"
    " WHERE available_at <= UTC_TIMESTAMP(6) + INTERVAL {us} MICROSECOND"
)


class OutboxRow(NamedTuple):
    """The primary key of a row of the outbox. It stands for one event."""

    task_id: bytes
    kind: str
    epoch: int


def created(task_id: bytes, epoch: int = 0) -> OutboxRow:
    """Return the row of a TaskCreated: the task's first event, or the one that begins `epoch`."""
    return OutboxRow(task_id, CREATED, epoch)


def cancelled(task_id: bytes, epoch: int) -> OutboxRow:
    """Return the row of the TaskCancelled of this epoch."""
    return OutboxRow(task_id, CANCELLED, epoch)


def outcome(task_id: bytes, epoch: int) -> OutboxRow:
    """Return the row of the MailSent or MailFailed that ended this epoch."""
    return OutboxRow(task_id, OUTCOME, epoch)


def row_of(event: ApiEvent) -> OutboxRow:
    """Return the row of this event."""
    if isinstance(event, pb.TaskCreated):
        return created(event.task.id, event.epoch)
    if isinstance(event, pb.TaskCancelled):
        return cancelled(event.id, event.epoch)
    return outcome(event.id, event.epoch)


def send_at(epoch: int, send_at_us: int) -> int:
    """Return the time at which this epoch of a task scheduled for `send_at_us` is sent; 0 for at once.

    An epoch is the time (Unix ms) at which the task was opened again. Retry and the sweeper both build the
    event of an epoch, and must compute the same time.
    """
    return send_at_us if send_at_us > epoch * 1000 else 0


def put(connection: Connection, rows: Sequence[OutboxRow], seconds: int = GRACE) -> None:
    """Insert rows that are due now. A sweeper may take them `seconds` from now. Existing rows stay."""
    due = f"UTC_TIMESTAMP(6) + INTERVAL {seconds:d} SECOND,UTC_TIMESTAMP(6)"
    execute_rows(connection, _PUT, rows, row=f"(%s,%s,%s,{due})")


def insert_scheduled(connection: Connection, rows: Sequence[tuple[OutboxRow, datetime]]) -> None:
    """Insert rows, each due at its time (naive UTC). Existing rows stay."""
    execute_rows(connection, _PUT, [(*row, due, due) for row, due in rows])


def delete(connection: Connection, rows: Sequence[OutboxRow]) -> None:
    """Delete the rows of published events. Missing rows are no error."""
    for (kind, epoch), ids in _by_kind_and_epoch(rows):
        execute(
            connection,
            f"DELETE FROM outbox WHERE task_id IN ({literal_list(ids)}) AND kind = %s AND epoch = %s",
            (kind, epoch),
        )


def take(connection: Connection, limit: int) -> list[OutboxRow]:
    """Return up to `limit` due rows, and keep other sweepers away from them for SWEEP_SECONDS.

    Skips rows that another sweeper is taking at the same moment. The caller commits at once.
    """
    rows = [OutboxRow(*row) for row in connection.exec_driver_sql(_DUE.format(limit=limit)).all()]
    defer(connection, rows, SWEEP_SECONDS)
    return rows


def next_due(connection: Connection, within: float) -> float:
    """Return the seconds until a sweeper may take the next row; `within` where there is none before that.

    Called after a `take` that took all. The result is negative for a row that another sweeper is taking.
    """
    us = connection.exec_driver_sql(_NEXT.format(us=int(within * 1e6))).scalar()
    return within if us is None else us / 1e6


def defer(connection: Connection, rows: Sequence[OutboxRow], seconds: int) -> None:
    """Let sweepers take these rows only `seconds` from now. Their due times stay."""
    for (kind, epoch), ids in _by_kind_and_epoch(rows):
        connection.exec_driver_sql(
            f"UPDATE outbox SET available_at = UTC_TIMESTAMP(6) + INTERVAL {seconds:d} SECOND"
            f" WHERE task_id IN ({placeholders(len(ids))}) AND kind = %s AND epoch = %s",
            (*ids, kind, epoch),
        )


def make_due(connection: Connection, task_id: bytes) -> None:
    """Make the task's scheduled rows due now. Rows that are being published stay as they are."""
    connection.exec_driver_sql(
        "UPDATE outbox SET available_at = UTC_TIMESTAMP(6), due_at = UTC_TIMESTAMP(6) WHERE task_id = %s"
        f" AND available_at > UTC_TIMESTAMP(6) + INTERVAL {SWEEP_SECONDS} SECOND",
        (task_id,),
    )


def _by_kind_and_epoch(rows: Sequence[OutboxRow]) -> Iterator[tuple[tuple[str, int], list[bytes]]]:
    """Yield the sorted task ids of each kind and epoch. The primary key reads such a list as ranges."""
    found: dict[tuple[str, int], list[bytes]] = {}
    for task_id, kind, epoch in rows:
        found.setdefault((kind, epoch), []).append(task_id)
    for key in sorted(found):
        yield key, sorted(found[key])
