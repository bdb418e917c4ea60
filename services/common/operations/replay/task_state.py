"""A task's state for a replay: its row in `tasks`, and its delivery where that knows more."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import NamedTuple

from sqlalchemy import Engine

from postroad.v1 import events_pb2 as pb
from services.common.database.bulk import placeholders
from services.common.database.transactions import transaction
from services.common.events import Event
from services.common.statuses import NOT_COMPLETED

__all__ = ["StoredDelivery", "TaskState", "combine", "new_task_state", "read_task_states"]

_LIMIT = 500
_QUERY = (
    "SELECT id, status, t.reason, t.epoch, recipient, domain, labels,"
    " d.state, d.epoch, d.attempt, d.next_attempt_at, d.reason"
    " FROM tasks t LEFT JOIN deliveries d ON d.task_id = t.id WHERE t.id IN"
)


class StoredDelivery(NamedTuple):
    """What a replay reads of a row in `deliveries`. Times are microseconds since the Unix epoch."""

    state: str
    epoch: int
    attempt: int
    next_attempt_at: int
    reason: str


class TaskState(NamedTuple):
    """A task's state. `deferred`: the sender's deferred attempt, and when the next one is due (microseconds).

    `attempt` is the sender's attempt that is claimed, was claimed when its sender died, or was released. It
    is 0 where there is none.
    """

    status: str
    reason: str
    epoch: int
    recipient: str = ""
    domain: str = ""
    labels: Mapping[str, str] = {}
    deferred: tuple[int, int] | None = None
    attempt: int = 0


def combine(row: TaskState, delivery: StoredDelivery | None) -> TaskState:
    """Return a task's state from its row and its delivery. Pure.

    The row is folded from events and may be late. The delivery decides whether a mail is sent.
    """
    if delivery is None or row.status == "completed":
        return row
    if delivery.state == "sent":
        return row._replace(status="completed", reason="")
    if delivery.epoch < row.epoch:
        return row
    if delivery.state in NOT_COMPLETED:
        if (row.status, row.epoch) == (delivery.state, delivery.epoch):
            return row
        # The delivery of a cancelled task keeps the reason from before the cancellation.
        reason = "" if delivery.state == "cancelled" else delivery.reason
        return row._replace(status=delivery.state, reason=reason, epoch=delivery.epoch)
    deferred = (delivery.attempt, delivery.next_attempt_at) if delivery.state == "deferred" else None
    return row._replace(
        status="processing",
        reason=delivery.reason if deferred else "",
        epoch=delivery.epoch,
        deferred=deferred,
        attempt=0 if deferred else delivery.attempt,
    )


def new_task_state(event: Event) -> TaskState:
    """Return the state of a task without a row: it was just recorded. Pure."""
    if isinstance(event, pb.TaskCreated | pb.MxOk):
        task = event.task
        return TaskState("pending", "", event.epoch, task.email, task.domain, dict(task.labels))
    return TaskState("pending", "", event.epoch)


def read_task_states(engine: Engine, ids: Collection[bytes]) -> dict[bytes, TaskState]:
    """Return the states of these tasks by their ids, without tasks that have no row.

    Blocks. Raises `sqlalchemy.exc.DBAPIError`.
    """
    found: dict[bytes, TaskState] = {}
    wanted = sorted(set(ids))
    for start in range(0, len(wanted), _LIMIT):
        part = tuple(wanted[start : start + _LIMIT])
        query = f"{_QUERY} ({placeholders(len(part))})"
        rows = transaction(engine, lambda c, q=query, p=part: c.exec_driver_sql(q, p).all())  # type: ignore[misc]
        for id_, status, reason, epoch, recipient, domain, labels, *delivery in rows:
            row = TaskState(
                status,
                reason,
                epoch,
                recipient or "",
                domain or "",
                json.loads(labels) if labels else {},
            )
            stored = None if delivery[0] is None else StoredDelivery(*delivery)
            found[bytes(id_)] = combine(row, stored)
    return found
