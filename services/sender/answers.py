"""What a settled row tells the other stages: the events and what becomes of the record. Pure.

The same row makes the same events, byte for byte: whoever finds it after a crash publishes what its
sender would have published.
"""

from __future__ import annotations

from collections.abc import Sequence

from postroad.v1 import events_pb2 as pb
from services.common.events import Event
from services.common.stage.types import Done, Outcome, Retry
from services.sender.decide import IN_DOUBT, Delivery

__all__ = ["answer", "event_of", "found_in_doubt"]

STAGE = "sender"


def answer(row: Delivery, delays: Sequence[int], now_ms: int) -> Outcome:
    """Return the outcome of the record whose row is settled as `row`.

    A deferred one comes back when the row says, or as late as the longest of `delays` (seconds) allows
    where the settings have changed since. Raises ValueError on a row that is not settled.
    """
    if row.state == "cancelled":
        return Done()
    event = event_of(row)
    if row.state != "deferred":
        return Done([event])
    delay, due_ms = _due(row, delays, now_ms)
    return Retry(delay, due_ms, f"{row.reason} {row.reply}".rstrip(), [event])


def event_of(row: Delivery) -> Event:
    """Return the event of a row that is sent, deferred, failed or uncertain; raises ValueError for others."""
    match row.state:
        case "sent":
            return _sent(row)
        case "deferred":
            return _deferred(row)
        case "failed" | "uncertain":
            return _failed(row)
        case _:
            raise ValueError(f"a delivery that is {row.state} has no event of the sender's")


def found_in_doubt(taken: Delivery, now_us: int) -> pb.MailDeferred:
    """Return the event of a claim that took over from an owner who may have handed the mail over."""
    return pb.MailDeferred(
        id=taken.task_id,
        epoch=taken.epoch,
        attempt=taken.attempt,
        stage=STAGE,
        reason=IN_DOUBT,
        message_id=taken.message_id,
        in_doubt=True,
        takeover=taken.takeovers - 1,
        at_us=now_us,
    )


def _sent(row: Delivery) -> pb.MailSent:
    return pb.MailSent(
        id=row.task_id,
        epoch=row.epoch,
        attempt=row.attempt,
        message_id=row.message_id,
        relay=row.relay,
        reply=row.reply,
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
        # Those before it stand for earlier doubts.
        takeover=row.takeovers if in_doubt else 0,
        at_us=row.settled_at,
    )


def _due(row: Delivery, delays: Sequence[int], now_ms: int) -> tuple[int, int]:
    """Return the delay topic and the due time (ms); jitter may have added a tenth to the delay."""
    due_ms = row.next_attempt_at // 1000
    delay = next((delay for delay in delays if now_ms + delay * 1100 >= due_ms), delays[-1])
    return delay, min(due_ms, now_ms + delay * 1100)
