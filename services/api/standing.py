"""Where a task really stands, under the locks of whoever decides about it. SQL; every function blocks.

The row in `tasks` follows the events, and these come after the facts: a mail that went out is settled in
`deliveries` first. So what a settled delivery says is folded in before anything is decided, as the status
service will do with the event once it comes. The locks are taken in the order task, delivery, by everybody
who takes both.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection

from postroad.v1 import task_pb2
from services.api import views
from services.common import taskstore
from services.common.deliveries.decide import Delivery
from services.common.deliveries.outcome import event_of, failed_before_sender
from services.common.deliveries.rows import lock_rows
from services.common.events import Event
from services.common.fold import delta
from services.common.timeline import timeline_entry

__all__ = ["OVER", "Standing", "find", "record", "told", "view"]

OVER = frozenset({"completed", "failed", "uncertain", "cancelled"})
"""The statuses of a task with which nothing more happens by itself."""

_TASK = "SELECT status, epoch, attempts FROM tasks WHERE id = %s AND tenant = %s FOR UPDATE"
_VIEW = f"SELECT {views.COLUMNS} FROM tasks WHERE id = %s"
_TOLD = ("sent", "failed", "uncertain")


class Standing(NamedTuple):
    """A task and its delivery, both locked; `now` is the database's time, of use only where `row` is."""

    status: str
    epoch: int
    attempts: int
    row: Delivery | None
    now: datetime

    @property
    def in_hand(self) -> bool:
        """Whether a sender has the task in its present epoch, be it between two attempts."""
        if self.row is None or self.row.epoch < self.epoch:
            return False
        return self.row.state in ("sending", "released", "deferred")

    def next_epoch(self, now_ms: int) -> int:
        """Return an epoch later than all that is known of the task: `now_ms`, unless clocks disagree."""
        return max(now_ms, self.epoch + 1, self.row.epoch + 1 if self.row is not None else 0)


def find(connection: Connection, tenant: str, id_: bytes) -> Standing | None:
    """Return where the task stands, None where this tenant has no such task."""
    task = told(connection, tenant, id_)
    if task is None:
        return None
    rows, now = lock_rows(connection, [id_])
    row = rows.get(id_)
    if row is not None and row.state in _TOLD and not failed_before_sender(row):
        record(connection, event_of(row))
        task = told(connection, tenant, id_) or task
    return Standing(*task, row, now)


def told(connection: Connection, tenant: str, id_: bytes) -> tuple[str, int, int] | None:
    """Return the status, epoch and attempts of a task's row, and lock it."""
    row = connection.exec_driver_sql(_TASK, (id_, tenant)).first()
    return None if row is None else (row[0], row[1], row[2])


def record(connection: Connection, *events: Event) -> None:
    """Fold events into the task's row and its timeline."""
    taskstore.upsert(connection, map(delta, events))
    taskstore.insert_events(connection, map(timeline_entry, events))


def view(connection: Connection, id_: bytes) -> task_pb2.Task:
    """Return the task as its client sees it."""
    return views.task(connection.exec_driver_sql(_VIEW, (id_,)).one())
