"""What becomes of a claimed row that its sender stores with an outcome: the fence. Pure."""

from __future__ import annotations

from enum import Enum

from services.common.deliveries.decide import Delivery

__all__ = ["Settlement", "settlement"]


class Settlement(Enum):
    """What became of a settled row."""

    STORED = "stored"
    """The caller still held the claim."""
    LATE = "late"
    """The claim was lost, but the relay took the mail, which is true whoever holds the claim: stored all
    the same."""
    FENCED = "fenced"
    """The claim was lost: the row is another owner's and stays as it is."""


def settlement(row: Delivery | None, settled: Delivery) -> tuple[Settlement, Delivery | None]:
    """Return what becomes of `settled`, the claimed row with its outcome, and the row to write, if any.

    A repeated call stores nothing twice.
    """
    if row is not None and row.owner == settled.owner:
        if row.state == "sending":
            return Settlement.STORED, settled
        if row.state == settled.state:
            # A repeated call. If the first one was late, the row stands for another event than the caller's.
            same = (row.epoch, row.attempt) == (settled.epoch, settled.attempt)
            return Settlement.STORED if same else Settlement.LATE, None
    if settled.state != "sent" or (row is not None and row.state == "sent"):
        return Settlement.FENCED, None
    if row is None or (row.epoch, row.attempt) < (settled.epoch, settled.attempt):
        return Settlement.LATE, settled
    late = settled._replace(epoch=row.epoch, attempt=row.attempt, doubts_in_all=row.doubts_in_all)
    return Settlement.LATE, late
