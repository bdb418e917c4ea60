"""A task's rows in `tasks` and `deliveries`, read under locks. Every function runs SQL and blocks.

The row in `tasks` follows the events, and the events follow the deliveries: the sender settles a mail in
`deliveries` first. `lock_task` therefore folds a settled delivery into the row before it returns the task.
The status service does the same when the event arrives.

Everyone who locks both rows locks `tasks` first, so that nobody deadlocks.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection

from postroad.v1 import task_pb2
from services.api import views
from services.common import taskstore
from services.common.deliveries.decide import Delivery
from services.common.deliveries.row_events import event_of, failed_before_sender
from services.common.deliveries.rows import lock_rows
from services.common.events import Event
from services.common.fold import delta
from services.common.timeline import timeline_row

__all__ = ["LockedTask", "fold_events", "lock_row", "lock_task", "view"]

_LOCK = "SELECT status, epoch, attempts FROM tasks WHERE id = %s AND tenant = %s FOR UPDATE"
_VIEW = f"SELECT {views.COLUMNS} FROM tasks WHERE id = %s"
_SETTLED = ("sent", "failed", "uncertain")


class LockedTask(NamedTuple):
    """A task's row and its delivery, both locked. `delivery` is None where no sender has claimed the task.

    `now` is the database's time. It is valid only with a delivery.
    """

    status: str
    epoch: int
    attempts: int
    delivery: Delivery | None
    now: datetime

    @property
    def held_by_sender(self) -> bool:
        """Whether a sender works on the task's present epoch. It also holds it between two attempts."""
        if self.delivery is None or self.delivery.epoch < self.epoch:
            return False
        return self.delivery.state in ("sending", "released", "deferred")

    def next_epoch(self, now_ms: int) -> int:
        """Return an epoch later than all known ones: `now_ms`, unless another replica's clock is ahead."""
        return max(now_ms, self.epoch + 1, self.delivery.epoch + 1 if self.delivery is not None else 0)


def lock_task(connection: Connection, tenant: str, id_: bytes) -> LockedTask | None:
    """Lock and return a task with its delivery; None where this tenant has no such task."""
    row = lock_row(connection, tenant, id_)
    if row is None:
        return None
    deliveries, now = lock_rows(connection, [id_])
    delivery = deliveries.get(id_)
    if delivery is not None and delivery.state in _SETTLED and not failed_before_sender(delivery):
        fold_events(connection, event_of(delivery))
        row = lock_row(connection, tenant, id_) or row
    return LockedTask(*row, delivery, now)


def lock_row(connection: Connection, tenant: str, id_: bytes) -> tuple[str, int, int] | None:
    """Lock a task's row in `tasks`; return its status, epoch and attempts."""
    row = connection.exec_driver_sql(_LOCK, (id_, tenant)).first()
    return None if row is None else (row[0], row[1], row[2])


def fold_events(connection: Connection, *events: Event) -> None:
    """Fold events into the task's row and add them to its timeline."""
    taskstore.upsert(connection, map(delta, events))
    taskstore.insert_events(connection, map(timeline_row, events))


def view(connection: Connection, id_: bytes) -> task_pb2.Task:
    """Return the task as a client sees it."""
    return views.task(connection.exec_driver_sql(_VIEW, (id_,)).one())
