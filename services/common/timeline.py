"""A task's timeline: one entry for each of its events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from google.protobuf.message import Message

from postroad.v1 import events_pb2 as pb
from services.common.database.tables import INT_MAX, task_events, widths
from services.common.database.times import clamped, from_micros
from services.common.deliveries.decide import NOT_SENT
from services.common.events import Event, event_key, task_id

__all__ = ["TimelineRow", "timeline_row", "timeline_values"]

_WIDTHS = widths(task_events)
_ID, _STAGE, _RELAY, _REPLY, _DETAIL = (
    _WIDTHS[name] for name in ("event_id", "stage", "relay", "reply", "detail")
)
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


_Entry = tuple[str, str, int, str, str, str, int]
"""Stage, kind, attempt, relay, reply, detail, and the next attempt in microseconds, 0 for none."""


def _created(event: pb.TaskCreated) -> _Entry:
    return "api", "retried" if event.epoch else "created", 0, "", "", "", event.send_at_us


def _mx_ok(event: pb.MxOk) -> _Entry:
    hosts = ", ".join([host.name for host in event.hosts])
    return "validator", "mx_ok", event.attempt, "", "", hosts, 0


def _mx_failed(event: pb.MxFailed) -> _Entry:
    detail = f"{event.reason}: {event.detail}" if event.detail else event.reason
    return "validator", "mx_failed", event.attempt, "", "", detail, 0


def _sent(event: pb.MailSent) -> _Entry:
    stage = "api" if event.resolved else "sender"
    return stage, "sent", event.attempt, event.relay, event.reply, event.message_id, 0


def _deferred(event: pb.MailDeferred) -> _Entry:
    kind, detail = ("in_doubt", _doubt(event)) if event.in_doubt else ("deferred", event.reason)
    return event.stage, kind, event.attempt, event.relay, event.reply, detail, event.next_attempt_at_us


def _failed(event: pb.MailFailed) -> _Entry:
    if event.reason == NOT_SENT:
        return "api", "failed", event.attempt, "", "", _doubt(event), 0
    kind, detail = ("in_doubt", _doubt(event)) if event.uncertain else ("failed", event.reason)
    return "sender", kind, event.attempt, event.relay, event.reply, detail, 0


def _cancelled(event: pb.TaskCancelled) -> _Entry:
    return "api", "cancelled", event.attempts, "", "", _MAY_BE_OUT if event.in_doubt else "", 0


def _doubt(event: pb.MailDeferred | pb.MailFailed) -> str:
    return f"{event.reason}: {event.message_id}" if event.reason else event.message_id


_ENTRIES: Mapping[type[Message], Callable[[Any], _Entry]] = {
    pb.TaskCreated: _created,
    pb.MxOk: _mx_ok,
    pb.MxFailed: _mx_failed,
    pb.MailSent: _sent,
    pb.MailDeferred: _deferred,
    pb.MailFailed: _failed,
    pb.TaskCancelled: _cancelled,
}


def timeline_values(event: Event) -> tuple[bytes, str, int, str, str, int, str, str, str, int | None]:
    """Return the values of `timeline_row` with times in microseconds, which a database can convert."""
    stage, kind, attempt, relay, reply, detail, next_at_us = _ENTRIES[type(event)](event)
    return (
        task_id(event),
        event_key(event)[:_ID],
        clamped(event.at_us),
        stage[:_STAGE],
        kind,
        attempt if attempt < INT_MAX else INT_MAX,
        relay[:_RELAY],
        reply[:_REPLY],
        detail[:_DETAIL],
        clamped(next_at_us) if next_at_us > 0 else None,
    )


def timeline_row(event: Event) -> TimelineRow:
    """Return the timeline's entry of `event`. The `detail` of an attempt in doubt has its Message-ID."""
    id_, event_id, at_us, *texts, next_at_us = timeline_values(event)
    next_at = None if next_at_us is None else from_micros(next_at_us)
    return TimelineRow._make((id_, event_id, from_micros(at_us), *texts, next_at))
