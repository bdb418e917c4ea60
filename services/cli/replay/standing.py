"""How a task stands: what its row in `tasks` says, and the sender's memory where that knows more. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from postroad.v1 import events_pb2 as pb
from services.common.events import Event

__all__ = ["ENDED", "Sending", "Standing", "first_seen", "known"]

ENDED = frozenset({"failed", "uncertain", "cancelled"})
"""The statuses of tasks that ended without their mails; deliveries have states of the same names."""


class Sending(NamedTuple):
    """What is read of a task's row in `deliveries`. Times are microseconds since the Unix epoch."""

    state: str
    epoch: int
    attempt: int
    next_attempt_at: int
    reason: str


class Standing(NamedTuple):
    """How a task stands. `waits`: the sender's attempt that was put off, and when the next one is due.

    `attempt`: the one that a sender has in hand, had when it died, or gave back; 0 where there is none.
    """

    status: str
    reason: str
    epoch: int
    recipient: str = ""
    domain: str = ""
    labels: Mapping[str, str] = {}
    waits: tuple[int, int] | None = None
    attempt: int = 0


def known(row: Standing, sending: Sending | None) -> Standing:
    """Return how a task stands whose row says `row`.

    The row is folded from events and may lag; `deliveries` is where it is decided whether a mail goes out.
    """
    if sending is None or row.status == "completed":
        return row
    if sending.state == "sent":
        return row._replace(status="completed", reason="")
    if sending.epoch < row.epoch:
        return row
    if sending.state in ENDED:
        if (row.status, row.epoch) == (sending.state, sending.epoch):
            return row
        # A cancelled one keeps the reason of what was cancelled.
        reason = "" if sending.state == "cancelled" else sending.reason
        return row._replace(status=sending.state, reason=reason, epoch=sending.epoch)
    waits = (sending.attempt, sending.next_attempt_at) if sending.state == "deferred" else None
    reason = sending.reason if waits else ""
    attempt = 0 if waits else sending.attempt
    return row._replace(status="processing", reason=reason, epoch=sending.epoch, waits=waits, attempt=attempt)


def first_seen(event: Event) -> Standing:
    """Return how a task stands that has no row: as one that was just recorded."""
    if isinstance(event, pb.TaskCreated | pb.MxOk):
        task = event.task
        return Standing("pending", "", event.epoch, task.email, task.domain, dict(task.labels))
    return Standing("pending", "", event.epoch)
