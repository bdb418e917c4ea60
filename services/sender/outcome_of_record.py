"""Makes the outcome of a record whose delivery is settled, and the event of a takeover. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import IN_DOUBT, Delivery
from services.common.deliveries.row_events import STAGE, event_of, failed_before_sender
from services.common.stage.types import Done, Outcome, Retry

__all__ = ["outcome_of_record", "takeover_event"]


def outcome_of_record(row: Delivery, delays: Sequence[int], now_ms: int) -> Outcome:
    """Return the outcome of the record whose delivery is settled as `row`.

    A deferred record comes back at the row's time. Where the settings have changed since and that time is
    too late for them, it comes back after the longest of `delays` (seconds). Raises ValueError for a row
    that is not settled.
    """
    if row.state == "sent":
        return Done([event_of(row)])
    if row.state == "cancelled" or failed_before_sender(row):
        return Done()
    event = event_of(row)
    if row.state != "deferred":
        return Done([event])
    delay, due_ms = _due(row, delays, now_ms)
    return Retry(delay, due_ms, f"{row.reason} {row.reply}".rstrip(), [event])


def takeover_event(taken: Delivery, now_us: int) -> pb.MailDeferred:
    """Return the event of a takeover from an owner that may have handed the mail over."""
    return pb.MailDeferred(
        id=taken.task_id,
        epoch=taken.epoch,
        attempt=taken.attempt,
        stage=STAGE,
        reason=IN_DOUBT,
        message_id=taken.message_id,
        in_doubt=True,
        takeover=taken.doubts_in_all - 1,
        at_us=now_us,
    )


def _due(row: Delivery, delays: Sequence[int], now_ms: int) -> tuple[int, int]:
    """Return the delay (seconds) and the due time (Unix ms); jitter may have added a tenth to the delay."""
    due_ms = row.next_attempt_at // 1000
    delay = next((delay for delay in delays if now_ms + delay * 1100 >= due_ms), delays[-1])
    return delay, min(due_ms, now_ms + delay * 1100)
