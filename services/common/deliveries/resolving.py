"""What becomes of an uncertain delivery once an operator has decided about it. Pure.

Each decision is of an epoch of its own, like a Cancel: what is under way of the task cannot overrule it.
"""

from __future__ import annotations

from services.common.deliveries.decide import NOT_SENT, RESOLVED, Delivery

__all__ = ["cancelled_row", "resolved_row"]


def cancelled_row(row: Delivery, epoch: int, owner: bytes) -> Delivery:
    """Return the row once its task is cancelled. It stays known that the mail may have gone out."""
    return row._replace(
        state="cancelled", epoch=epoch, owner=owner, takeovers=row.takeovers + 1, reason="", next_attempt_at=0
    )


def resolved_row(row: Delivery, sent: bool, epoch: int, owner: bytes, now_us: int) -> Delivery:
    """Return the row once an operator found that the mail was sent or was not. No doubt is left then.

    `outcome.event_of` makes the event that tells of it. `now_us`: microseconds since the Unix epoch.
    """
    return row._replace(
        state="sent" if sent else "failed",
        epoch=epoch,
        owner=owner,
        takeovers=0,
        doubts=0,
        settled_at=now_us,
        next_attempt_at=0,
        reason=RESOLVED if sent else NOT_SENT,
        reply="",
        relay="",
    )
