"""Makes the event of a settled row. Pure.

The same row always makes the same bytes, so after a crash another sender publishes what the first would have.
"""

from __future__ import annotations

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import IN_DOUBT, RESOLVED, Delivery
from services.common.events import Event

__all__ = ["STAGE", "event_of", "failed_before_sender"]

STAGE = "sender"


def failed_before_sender(row: Delivery) -> bool:
    """Return whether the task failed before a sender claimed it (mx_failures.py): its only event is
    `mx.failed`."""
    return row.state == "failed" and row.attempt == 0


def event_of(row: Delivery) -> Event:
    """Return the event of a sent, deferred, failed or uncertain row. Raises ValueError for others."""
    match row.state:
        case "sent":
            return _sent(row)
        case "deferred":
            return _deferred(row)
        case "failed" | "uncertain":
            return _failed(row)
        case _:
            raise ValueError(f"a delivery that is {row.state} has no event of the sender's")


def _sent(row: Delivery) -> pb.MailSent:
    return pb.MailSent(
        id=row.task_id,
        epoch=row.epoch,
        attempt=row.attempt,
        message_id=row.message_id,
        relay=row.relay,
        reply=row.reply,
        resolved=row.reason == RESOLVED,
        at_us=row.settled_at,
    )


def _failed(row: Delivery) -> pb.MailFailed:
    return pb.MailFailed(
        id=row.task_id,
        epoch=row.epoch,
        attempt=row.attempt,
        reason=row.reason,
        reply=row.reply,
        relay=row.relay,
        message_id=row.message_id,
        uncertain=row.state == "uncertain",
        at_us=row.settled_at,
    )


def _deferred(row: Delivery) -> pb.MailDeferred:
    in_doubt = row.reason == IN_DOUBT
    return pb.MailDeferred(
        id=row.task_id,
        epoch=row.epoch,
        attempt=row.attempt,
        stage=STAGE,
        reason=row.reason,
        reply=row.reply,
        relay=row.relay,
        message_id=row.message_id,
        next_attempt_at_us=row.next_attempt_at,
        in_doubt=in_doubt,
        # As many doubts came before.
        takeover=row.doubts_in_all if in_doubt else 0,
        at_us=row.settled_at,
    )
