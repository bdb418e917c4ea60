"""A task's timeline: one entry for each of its events."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from postroad.v1 import events_pb2 as pb
from services.common.database.tables import INT_MAX, task_events, widths
from services.common.database.times import from_micros
from services.common.deliveries.decide import NOT_SENT
from services.common.events import Event, event_key, task_id

__all__ = ["TimelineRow", "timeline_row"]

_WIDTHS = widths(task_events)
_MAY_BE_OUT = "the mail may have gone out"


class TimelineRow(NamedTuple):
    """An entry of a task's timeline: a row of `task_events`, in the order of its columns."""

    task_id: bytes
    event_id: str
    at: datetime
    stage: str
    kind: str
    attempt: int
    relay: str
    reply: str
    detail: str
    next_attempt_at: datetime | None


def _entry(
    event: Any,
    stage: str,
    kind: str,
    attempt: int = 0,
    detail: str = "",
    *,
    relay: str = "",
    reply: str = "",
    next_at_us: int = 0,
) -> TimelineRow:
    return TimelineRow(
        task_id(event),
        event_key(event)[: _WIDTHS["event_id"]],
        from_micros(event.at_us),
        stage[: _WIDTHS["stage"]],
        kind,
        min(attempt, INT_MAX),
        relay[: _WIDTHS["relay"]],
        reply[: _WIDTHS["reply"]],
        detail[: _WIDTHS["detail"]],
        from_micros(next_at_us) if next_at_us > 0 else None,
    )


def _doubt(event: pb.MailDeferred | pb.MailFailed) -> str:
    return f"{event.reason}: {event.message_id}" if event.reason else event.message_id


def timeline_row(event: Event) -> TimelineRow:
    """Return the timeline's entry of `event`. The `detail` of an attempt in doubt has its Message-ID."""
    match event:
        case pb.TaskCreated():
            kind = "retried" if event.epoch else "created"
            return _entry(event, "api", kind, next_at_us=event.send_at_us)
        case pb.MxOk():
            hosts = ", ".join(host.name for host in event.hosts)
            return _entry(event, "validator", "mx_ok", event.attempt, hosts)
        case pb.MxFailed():
            detail = f"{event.reason}: {event.detail}" if event.detail else event.reason
            return _entry(event, "validator", "mx_failed", event.attempt, detail)
        case pb.MailSent():
            stage = "api" if event.resolved else "sender"
            return _entry(
                event, stage, "sent", event.attempt, event.message_id, relay=event.relay, reply=event.reply
            )
        case pb.MailDeferred():
            kind, detail = ("in_doubt", _doubt(event)) if event.in_doubt else ("deferred", event.reason)
            return _entry(
                event,
                event.stage,
                kind,
                event.attempt,
                detail,
                relay=event.relay,
                reply=event.reply,
                next_at_us=event.next_attempt_at_us,
            )
        case pb.MailFailed():
            if event.reason == NOT_SENT:
                return _entry(event, "api", "failed", event.attempt, _doubt(event))
            kind, detail = ("in_doubt", _doubt(event)) if event.uncertain else ("failed", event.reason)
            return _entry(event, "sender", kind, event.attempt, detail, relay=event.relay, reply=event.reply)
        case pb.TaskCancelled():
            return _entry(event, "api", "cancelled", event.attempts, _MAY_BE_OUT if event.in_doubt else "")
