"""What a record of an event topic says of its task: pure, small, and without the mail's body.

Its `needs` are what must have happened to the task before. Events of a task come from several topics, each
in order, and are read in any order between them; by its needs one knows that another is still to come.
"""

from __future__ import annotations

from typing import NamedTuple

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import NOT_SENT
from services.common.events import DECODERS, Event
from services.common.fold import EPOCH_SHIFT, TaskRow, delta
from services.common.timeline import TimelineEntry, timeline_entry

__all__ = ["Change", "Place", "Step", "age", "change"]

Place = tuple[str, int]
"""A partition: the topic's bare name and the partition's number."""
Step = tuple[str, int, int]
"""A point in a task's life: its name, the epoch and, of those that repeat, the attempt."""


class Change(NamedTuple):
    """One event. `row` is its `fold.delta` without idempotency key and hash; `at_ms` is the record's time.

    `replayed`: it stood on its topic before.
    """

    row: TaskRow
    entry: TimelineEntry
    step: Step
    needs: tuple[Step, ...]
    replayed: bool
    place: Place
    offset: int
    at_ms: int


def change(value: bytes | None, replayed: bool, place: Place, offset: int, at_ms: int) -> Change:
    """Return what a record says; raise events.Undecodable. `replayed`: a replay produced it."""
    event = DECODERS[place[0]](value)
    # A replay that reopens a task tells something new: its epoch is its time.
    replayed = replayed and event.at_us // 1000 != event.epoch
    row = delta(event)
    if row.request_hash is not None or row.idempotency_key is not None:
        row = row._replace(idempotency_key=None, request_hash=None)
    step, needs = _life(event)
    return Change(row, timeline_entry(event), step, needs, replayed, place, offset, at_ms)


def age(change: Change) -> tuple[int, int]:
    """Return what orders the changes of a task as they happened: by epoch, in it as the fold orders them."""
    if change.entry.kind == "mx_failed":
        # Nothing follows it, unless it is a late one, which the sender's changes have overruled.
        return change.row.epoch, 1 << 64
    # The bit that makes `completed` absorb everything stands above the epoch in a version.
    return change.row.epoch, change.row.version & ((1 << EPOCH_SHIFT) - 1) | change.row.version >> 63 << 63


def _life(event: Event) -> tuple[Step, tuple[Step, ...]]:
    epoch = event.epoch
    first, created, judged = ("created", 0, 0), ("created", epoch, 0), ("judged", epoch, 0)
    match event:
        case pb.TaskCreated():
            return created, (first,) if epoch else ()
        case pb.TaskCancelled():
            return ("cancelled", epoch, 0), (first,)
        case pb.MxOk() | pb.MxFailed():
            return judged, (created, *_before("lookup", epoch, event.attempt))
        case pb.MailDeferred() if event.stage == "validator":
            lookup = ("lookup", epoch, event.attempt)
            return lookup, (created, *_before("lookup", epoch, event.attempt))
        case pb.MailDeferred():
            return ("sending", epoch, event.attempt), (judged, *_before("sending", epoch, event.attempt))
        case pb.MailSent() | pb.MailFailed() if _found(event):
            # An operator found it out, in an epoch in which nothing else happens.
            return ("over", epoch, 0), (first,)
        case pb.MailSent() | pb.MailFailed():
            return ("over", epoch, 0), (judged, *_before("sending", epoch, event.attempt))


def _found(event: pb.MailSent | pb.MailFailed) -> bool:
    return event.resolved if isinstance(event, pb.MailSent) else event.reason == NOT_SENT


def _before(name: str, epoch: int, attempt: int) -> tuple[Step, ...]:
    return ((name, epoch, attempt - 1),) if attempt > 1 else ()
