"""What the topics tell of a task's delivery: enough of its row in `deliveries` that no mail goes twice. Pure.

The sender settles a row before it publishes, so the latest of its events says what the row was then. What a
sender has taken and not settled, or settled and not published, stands nowhere but in the row itself.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from postroad.v1 import events_pb2 as pb
from services.common.database.tables import INT_MAX, deliveries, widths
from services.common.database.times import to_micros
from services.common.deliveries.decide import IN_DOUBT, NO_OWNER, RESOLVED, Delivery, DeliveryState
from services.common.deliveries.outcome import STAGE
from services.common.events import Event

__all__ = ["Told", "merge", "restored", "told"]

_WIDTHS = widths(deliveries)


class Told(NamedTuple):
    """What is known of a delivery. `version` is the fold's; `doubts`: so often, at least, it was in doubt."""

    task_id: bytes
    version: int
    state: DeliveryState
    epoch: int
    attempt: int
    doubts: int
    settled_at: int
    next_attempt_at: int
    reason: str
    reply: str
    relay: str
    message_id: str


def told(event: Event, version: int) -> Told | None:
    """Return what an event, of this version in the fold, tells; None where it is not about the delivery.

    Texts are cut to their columns' widths.
    """
    match event:
        case pb.MailSent():
            row = _told(event, version, "sent")
            return row._replace(reason=RESOLVED if event.resolved else "")
        case pb.MailFailed():
            row = _told(event, version, "uncertain" if event.uncertain else "failed")
            # How often it was in doubt before is not said; that it was, is what counts.
            return row._replace(doubts=int(event.uncertain))
        case pb.MailDeferred() if event.stage == STAGE:
            row = _told(event, version, "deferred")
            if event.in_doubt:
                row = row._replace(doubts=min(event.takeover, INT_MAX - 1) + 1)
            if event.in_doubt and not event.next_attempt_at_us:
                # Published by who took it over, before the mail went out again.
                return row._replace(state="sending", settled_at=0, reason="", reply="", relay="")
            return row._replace(next_attempt_at=event.next_attempt_at_us)
        case pb.TaskCancelled():
            attempts = min(event.attempts, INT_MAX)
            # One that closed an uncertain task decides, and tells of a doubt.
            reason = IN_DOUBT if event.in_doubt else ""
            doubts = int(event.in_doubt)
            return Told(
                event.id, version, "cancelled", event.epoch, attempts, doubts, 0, 0, reason, "", "", ""
            )
        case pb.MxFailed():
            # As services/common/deliveries/mx_failures.py has it.
            reason = event.reason[: _WIDTHS["reason"]]
            return Told(event.id, version, "failed", event.epoch, 0, 0, event.at_us, 0, reason, "", "", "")
    return None


def _told(event: pb.MailSent | pb.MailFailed | pb.MailDeferred, version: int, state: DeliveryState) -> Told:
    return Told(
        event.id,
        version,
        state,
        event.epoch,
        min(event.attempt, INT_MAX),
        0,
        event.at_us,
        0,
        getattr(event, "reason", "")[: _WIDTHS["reason"]],
        event.reply[: _WIDTHS["reply"]],
        event.relay[: _WIDTHS["relay"]],
        event.message_id[: _WIDTHS["message_id"]],
    )


def merge(a: Told, b: Told) -> Told:
    """Return what two of a task's tell together: the later one, all doubts, and a Message-ID once known."""
    late, early = (b, a) if b.version > a.version else (a, b)
    return late._replace(doubts=max(a.doubts, b.doubts), message_id=late.message_id or early.message_id)


def restored(known: Told, now: datetime) -> Delivery:
    """Return the row. `now`: the database's time, naive UTC; a claim that was under way is over since then.

    A cancelled one that was ever in doubt is uncertain, as `decide` has it, unless it was uncertain before.
    """
    state, reason, settled_at, doubts = known.state, known.reason, known.settled_at, known.doubts
    if state == "deferred" and reason == IN_DOUBT:
        # Its own doubt is not among those that it was taken with.
        doubts -= 1
    elif state == "cancelled" and reason == IN_DOUBT:
        reason = ""
    elif state == "cancelled" and doubts:
        state, reason = "uncertain", IN_DOUBT
        settled_at = to_micros(now)
    return Delivery(
        known.task_id,
        state,
        known.epoch,
        known.attempt,
        doubts,
        NO_OWNER,
        now,
        settled_at,
        known.next_attempt_at,
        reason,
        known.reply,
        known.relay,
        known.message_id,
        # Of all epochs: rather too few resends than too many.
        doubts,
    )
