"""One record of an event topic as a change of its task, without the mail's body. Pure.

The events of a task are on several topics. Each topic keeps its order, but Watch reads them interleaved in
any order. A change therefore names its predecessors: the steps that the task must have reached before.
"""

from __future__ import annotations

from typing import NamedTuple

from postroad.v1 import events_pb2 as pb
from services.common.deliveries.decide import NOT_SENT
from services.common.events import DECODERS, Event
from services.common.fold import EPOCH_SHIFT, TaskRow, delta
from services.common.kafka.topic_partition import TopicPartition
from services.common.timeline import TimelineRow, timeline_row

__all__ = ["Change", "Step", "change_of", "order_in_task"]

Step = tuple[str, int, int]
"""A point that a task reaches: its name, the epoch, and the attempt where the step has attempts."""


class Change(NamedTuple):
    """One event.

    `row` is the event's `fold.delta`, without idempotency key and request hash. `replayed` says that the
    event was on its topic before. `partition` has the topic's bare name. `at_ms` is the record's time (Unix
    ms).
    """

    row: TaskRow
    entry: TimelineRow
    step: Step
    predecessors: tuple[Step, ...]
    replayed: bool
    partition: TopicPartition
    offset: int
    at_ms: int


def change_of(
    value: bytes | None, from_replay: bool, partition: TopicPartition, offset: int, at_ms: int
) -> Change:
    """Return the change of a record; raise events.Undecodable. A replay produced it if `from_replay`."""
    event = DECODERS[partition.topic](value)
    # A replay that reopens a task begins an epoch, which is its time. That event is new.
    replayed = from_replay and event.at_us // 1000 != event.epoch
    row = delta(event)
    if row.request_hash is not None or row.idempotency_key is not None:
        row = row._replace(idempotency_key=None, request_hash=None)
    step, predecessors = _steps(event)
    return Change(row, timeline_row(event), step, predecessors, replayed, partition, offset, at_ms)


def order_in_task(change: Change) -> tuple[int, int]:
    """Return a key that sorts the changes of one task: by epoch, then as the fold orders them."""
    if change.entry.kind == "mx_failed":
        # A failed verdict ends its epoch. After it comes only a late verdict, which the sender overrules.
        return change.row.epoch, 1 << 64
    # In a version the bit of `completed` is above the epoch. Here it ranks below the epoch.
    return change.row.epoch, change.row.version & ((1 << EPOCH_SHIFT) - 1) | change.row.version >> 63 << 63


def _steps(event: Event) -> tuple[Step, tuple[Step, ...]]:
    """Return the step that the event reaches, and its predecessors."""
    epoch = event.epoch
    first, created, verdict = ("created", 0, 0), ("created", epoch, 0), ("verdict", epoch, 0)
    match event:
        case pb.TaskCreated():
            return created, (first,) if epoch else ()
        case pb.TaskCancelled():
            return ("cancelled", epoch, 0), (first,)
        case pb.MxOk() | pb.MxFailed():
            return verdict, (created, *_attempt_before("lookup", epoch, event.attempt))
        case pb.MailDeferred() if event.stage == "validator":
            lookup = ("lookup", epoch, event.attempt)
            return lookup, (created, *_attempt_before("lookup", epoch, event.attempt))
        case pb.MailDeferred():
            sending = ("sending", epoch, event.attempt)
            return sending, (verdict, *_attempt_before("sending", epoch, event.attempt))
        case pb.MailSent() | pb.MailFailed() if _is_resolution(event):
            # A Resolve begins an epoch of its own, in which nothing else happens.
            return ("over", epoch, 0), (first,)
        case pb.MailSent() | pb.MailFailed():
            return ("over", epoch, 0), (verdict, *_attempt_before("sending", epoch, event.attempt))


def _is_resolution(event: pb.MailSent | pb.MailFailed) -> bool:
    return event.resolved if isinstance(event, pb.MailSent) else event.reason == NOT_SENT


def _attempt_before(name: str, epoch: int, attempt: int) -> tuple[Step, ...]:
    return ((name, epoch, attempt - 1),) if attempt > 1 else ()
