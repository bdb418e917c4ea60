"""The row of a task from its events. Pure: the result depends neither on their order nor on repetitions.

A row is an element of a join-semilattice: `delta` makes a row of one event, and `merge` is the join of two.
The join is commutative, associative and idempotent, and so is every fold over it. Two facts carry that. The
columns that describe the mail are the same in every event that has them. The other columns come from the
row with the higher version.

A version is one unsigned 64-bit number:

    bit  63      completed, which absorbs everything
    bits 21-62   epoch: milliseconds since the Unix epoch, 42 bits, until the year 2109
    bits 18-20   tier, see below
    bits  4-17   attempt, up to 16,383; of a verdict on the domain up to 8,191, bit 17 says that it failed
    bits  0-3    within an attempt: in doubt, after n earlier doubts (0-14), or over (15)

Within an epoch every event of the sender outranks the validator's verdicts. The validator may handle
`task.created` a second time (a crash, a group reset) and find another verdict. By then the sender
decides about the mail. Among the verdicts the failure outranks `mx.ok`: the status service has stored it as
a delivery that the sender obeys (deliveries/mx_failures.py).

Different events of a task have different versions. A value beyond its field's width is capped; of two equal
versions the first wins. Events of one version come from one topic partition, in one order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from google.protobuf.message import Message

from postroad.v1 import events_pb2 as pb
from services.common.database.tables import INT_MAX, tasks, widths
from services.common.database.times import clamped, from_micros
from services.common.events import Event

__all__ = ["EPOCH_SHIFT", "NEW_TASK", "Progress", "TaskRow", "delta", "fold", "join", "merge", "progress"]

EPOCH_SHIFT = 21
_TIER_SHIFT, _ATTEMPT_SHIFT = 18, 4
_COMPLETED = 1 << 63
_EPOCH_MAX, _ATTEMPT_MAX, _OVER = (1 << 42) - 1, (1 << 14) - 1, 15

# Tiers, in the order in which a task reaches them. Versions are stored, so the numbers stay. 5 was the tier
# of `mx.failed`, above the sender's deferral.
_CREATED, _MX_DEFERRED, _MX, _MAIL_DEFERRED, _CANCELLED = range(5)
_MAIL_FAILED, _UNCERTAIN = 6, 7
_MX_FAILED = 1 << 13


class TaskRow(NamedTuple):
    """A row of `tasks`, in the order of its columns. The columns of `task.created` are None until it is
    known."""

    id: bytes
    tenant: str | None
    idempotency_key: bytes | None
    request_hash: bytes | None
    recipient: str | None
    domain: str | None
    subject: str | None
    labels: str | None
    created_at: datetime | None
    status: str
    version: int
    epoch: int
    attempts: int
    next_attempt_at: datetime | None
    reason: str
    reply: str
    message_id: str
    updated_at: datetime


_WIDTHS = widths(tasks)
_REASON, _REPLY, _MESSAGE_ID = (_WIDTHS[name] for name in ("reason", "reply", "message_id"))


@lru_cache(4096)
def _version(epoch: int, tier: int, attempt: int = 0, within: int = _OVER) -> int:
    rank = tier << _TIER_SHIFT | min(attempt, _ATTEMPT_MAX) << _ATTEMPT_SHIFT | within
    return min(epoch, _EPOCH_MAX) << EPOCH_SHIFT | rank


NEW_TASK = _version(0, _CREATED)
"""The version of a task of which only its creation is known: no row has a lower one."""

_Mail = tuple[
    str | None, bytes | None, bytes | None, str | None, str | None, str | None, str | None, datetime | None
]
_UNKNOWN: _Mail = (None, None, None, None, None, None, None, None)


def _mail(task: Any) -> _Mail:
    key, digest, labels = task.idempotency_key, task.request_hash, task.labels
    return (
        task.tenant[: _WIDTHS["tenant"]],
        key.encode()[: _WIDTHS["idempotency_key"]] if key else None,
        digest[:32].ljust(32, b"\0") if digest else None,
        task.email[: _WIDTHS["recipient"]],
        task.domain[: _WIDTHS["domain"]],
        task.subject[: _WIDTHS["subject"]],
        json.dumps(dict(labels), sort_keys=True, separators=(",", ":")) if labels else None,
        from_micros(task.created_at_us),
    )


class Progress(NamedTuple):
    """How far a task is: the columns of its row that change once its mail is known. Times in microseconds."""

    id: bytes
    status: str
    version: int
    epoch: int
    attempts: int
    next_at_us: int | None
    reason: str
    reply: str
    message_id: str
    at_us: int


def _created(event: pb.TaskCreated) -> Progress:
    epoch, next_at_us = event.epoch, event.send_at_us
    next_at = clamped(next_at_us) if next_at_us > 0 else None
    version = _version(epoch, _CREATED)
    return Progress(event.task.id, "pending", version, epoch, 0, next_at, "", "", "", clamped(event.at_us))


def _mx_ok(event: pb.MxOk) -> Progress:
    epoch = event.epoch
    version = _version(epoch, _MX, min(event.attempt, _MX_FAILED - 1))
    return Progress(event.task.id, "processing", version, epoch, 0, None, "", "", "", clamped(event.at_us))


def _mx_failed(event: pb.MxFailed) -> Progress:
    epoch, reason = event.epoch, event.reason[:_REASON]
    version = _version(epoch, _MX, _MX_FAILED | min(event.attempt, _MX_FAILED - 1))
    return Progress(event.id, "failed", version, epoch, 0, None, reason, "", "", clamped(event.at_us))


def _attempted(event: Any, status: str, version: int, reason: str, next_at_us: int = 0) -> Progress:
    attempt = event.attempt
    return Progress(
        event.id,
        status,
        version,
        event.epoch,
        attempt if attempt < INT_MAX else INT_MAX,
        clamped(next_at_us) if next_at_us > 0 else None,
        reason[:_REASON],
        event.reply[:_REPLY],
        event.message_id[:_MESSAGE_ID],
        clamped(event.at_us),
    )


def _deferred(event: pb.MailDeferred) -> Progress:
    epoch, attempt = event.epoch, event.attempt
    if event.stage == "validator":
        version = _version(epoch, _MX_DEFERRED, attempt)
        row = _attempted(event, "pending", version, event.reason, event.next_attempt_at_us)
        return row._replace(attempts=0, reply="", message_id="")
    within = min(event.takeover, _OVER - 1) if event.in_doubt else _OVER
    version = _version(epoch, _MAIL_DEFERRED, attempt, within)
    return _attempted(event, "processing", version, event.reason, event.next_attempt_at_us)


def _failed(event: pb.MailFailed) -> Progress:
    status, tier = ("uncertain", _UNCERTAIN) if event.uncertain else ("failed", _MAIL_FAILED)
    return _attempted(event, status, _version(event.epoch, tier, event.attempt), event.reason)


def _cancelled(event: pb.TaskCancelled) -> Progress:
    epoch, attempts = event.epoch, min(event.attempts, INT_MAX)
    version = _version(epoch, _CANCELLED, event.attempts)
    return Progress(event.id, "cancelled", version, epoch, attempts, None, "", "", "", clamped(event.at_us))


def _sent(event: pb.MailSent) -> Progress:
    return _attempted(event, "completed", _COMPLETED | _version(event.epoch, 0, event.attempt), "")


_PROGRESS: Mapping[type[Message], Callable[[Any], Progress]] = {
    pb.TaskCreated: _created,
    pb.MxOk: _mx_ok,
    pb.MxFailed: _mx_failed,
    pb.MailDeferred: _deferred,
    pb.MailFailed: _failed,
    pb.TaskCancelled: _cancelled,
    pb.MailSent: _sent,
}


def progress(event: Event) -> Progress:
    """Return how far the task is if only `event` is known.

    It cuts texts to their columns' widths, so that a join sees what the database stores.
    """
    return _PROGRESS[type(event)](event)


def delta(event: Event) -> TaskRow:
    """Return the row of a task of which only `event` is known: its progress, and its mail if it has it."""
    id_, status, version, epoch, attempts, next_at_us, *texts, at_us = progress(event)
    mail = _mail(event.task) if isinstance(event, pb.TaskCreated | pb.MxOk) else _UNKNOWN
    next_at = None if next_at_us is None else from_micros(next_at_us)
    return TaskRow._make((id_, *mail, status, version, epoch, attempts, next_at, *texts, from_micros(at_us)))


def join(a: Progress, b: Progress) -> Progress:
    """Return the join of two states of progress of one task, as `merge` does for rows."""
    late, early = (b, a) if b.version > a.version else (a, b)
    if early.attempts > late.attempts and late.version >> EPOCH_SHIFT == early.version >> EPOCH_SHIFT:
        return late._replace(attempts=early.attempts)
    return late


def merge(a: TaskRow, b: TaskRow) -> TaskRow:
    """Return the join of two rows of one task. `taskstore.upsert` does the same in SQL."""
    late, early = (b, a) if b.version > a.version else (a, b)
    mail = a[1:9] if a.created_at is not None else b[1:9]
    attempts = late.attempts
    if late.version >> EPOCH_SHIFT == early.version >> EPOCH_SHIFT:
        # A cancellation knows no attempts, and must not undo those of its epoch's other events.
        attempts = max(attempts, early.attempts)
    return TaskRow._make((late.id, *mail, *late[9:12], attempts, *late[13:]))


def fold(row: TaskRow | None, event: Event) -> TaskRow:
    """Return the task's row after `event`; the order and repetition of events do not matter."""
    return delta(event) if row is None else merge(row, delta(event))
