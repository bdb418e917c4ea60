"""The delivery of an uncertain task after an operator's decision. Pure.

Like a Cancel, each decision has an epoch of its own, so that records of earlier epochs cannot overrule it.
"""

from __future__ import annotations

from services.common.deliveries.decide import NOT_SENT, RESOLVED, Delivery

__all__ = ["cancelled_row", "resolved_row"]


def cancelled_row(row: Delivery, epoch: int, owner: bytes) -> Delivery:
    """Return the row of the cancelled task. Its doubts still say that the mail may have gone out."""
    return row._replace(
        state="cancelled",
        epoch=epoch,
        owner=owner,
        doubts_in_all=row.doubts_in_all + 1,
        reason="",
        next_attempt_at=0,
    )


def resolved_row(row: Delivery, sent: bool, epoch: int, owner: bytes, now_us: int) -> Delivery:
    """Return the row after an operator found out whether the mail was sent; no doubt is left.

    `row_events.event_of` makes its event. `now_us` is in microseconds since the Unix epoch.
    """
    return row._replace(
        state="sent" if sent else "failed",
        epoch=epoch,
        owner=owner,
        doubts_in_all=0,
        doubts_in_epoch=0,
        settled_at=now_us,
        next_attempt_at=0,
        reason=RESOLVED if sent else NOT_SENT,
        reply="",
        relay="",
    )
