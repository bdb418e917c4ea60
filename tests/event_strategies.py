"""Hypothesis strategies for the events of one task: those that services emit, and stranger ones."""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import strategies as st

from postroad.v1 import events_pb2 as pb
from services.common.events import Event

__all__ = ["distinct", "events_of", "histories", "mail_task"]

# Few values, so that events of one version, of neighbouring ones and of far ones all meet.
_EPOCHS = st.sampled_from([0, 1, 1_700_000_000_000, 1_700_000_000_001, (1 << 42) - 1, (1 << 64) - 1])
_ATTEMPTS = st.sampled_from([0, 1, 2, 3, 16_383, (1 << 32) - 1])
_TIMES = st.sampled_from([0, 1, 1_763_976_543_123_456, 1_763_976_543_123_457, (1 << 63) - 1, -1])
_TEXTS = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ["", "250 ok", "é" * 2000, "\U0001f4ee" * 1100, "x" * 4096, "a ", "a\0'\\%s\u2028"]
)
_STAGES = st.sampled_from(["validator", "sender", "sender", "", "somebody else altogether"])
_COUNTS = st.sampled_from([0, 1, 2, 13, 14])


def mail_task(number: int, *, full: bool = True) -> pb.MailTask:
    """Return the mail task of that number. All its events describe it alike."""
    task = pb.MailTask(
        id=hashlib.md5(str(number).encode()).digest(),
        tenant="tenant",
        email=f"user{number}@example.test",
        domain="example.test",
        subject=f"Ünïcode \U0001f4ee {number}",
        body="body",
        created_at_us=1_763_976_543_123_456 + number,
    )
    if full:
        task.idempotency_key = f"key {number} "
        task.request_hash = hashlib.sha256(str(number).encode()).digest()
        task.labels.update({"team": "blue", "a": "é"})
        task.html = "<p>body</p>"
        task.headers["X-Tag"] = "tag"
    return task


@st.composite
def events_of(draw: Any, task: pb.MailTask) -> Event:
    """Draw one event of `task`."""
    kind = draw(st.sampled_from(["created", "ok", "no", "sent", "deferred", "failed", "cancelled"]))
    id_, epoch, at = task.id, draw(_EPOCHS), draw(_TIMES)
    if kind == "created":
        return pb.TaskCreated(task=task, epoch=epoch, at_us=at, send_at_us=draw(_TIMES))
    attempt = draw(_ATTEMPTS)
    if kind == "cancelled":
        return pb.TaskCancelled(id=id_, epoch=epoch, attempts=attempt, at_us=at)
    if kind == "ok":
        return pb.MxOk(task=task, epoch=epoch, attempt=attempt, at_us=at)
    if kind == "no":
        return pb.MxFailed(id=id_, epoch=epoch, attempt=attempt, reason=draw(_TEXTS), at_us=at)
    more = {"reply": draw(_TEXTS), "message_id": draw(_TEXTS), "relay": draw(_TEXTS)}
    if kind == "sent":
        return pb.MailSent(id=id_, epoch=epoch, attempt=attempt, at_us=at, **more)
    more["reason"] = draw(_TEXTS)
    if kind == "failed":
        uncertain = draw(st.booleans())
        return pb.MailFailed(id=id_, epoch=epoch, attempt=attempt, uncertain=uncertain, at_us=at, **more)
    return pb.MailDeferred(
        id=id_,
        epoch=epoch,
        attempt=attempt,
        stage=draw(_STAGES),
        in_doubt=draw(st.booleans()),
        takeover=draw(_COUNTS),
        next_attempt_at_us=draw(_TIMES),
        at_us=at,
        **more,
    )


def distinct(events: list[Event], version: Any) -> list[Event]:
    """Leave out events with the version of an earlier one: within one task these are duplicates."""
    seen: dict[tuple[bytes, int], Event] = {}
    for event in events:
        seen.setdefault(version(event), event)
    return list(seen.values())


@st.composite
def histories(draw: Any, tasks: int, size: int) -> list[Event]:
    """Draw up to `size` events of up to `tasks` tasks."""
    numbers = draw(st.lists(st.integers(0, tasks - 1), min_size=1, max_size=size))
    return [draw(events_of(mail_task(number, full=number % 2 == 0))) for number in numbers]
