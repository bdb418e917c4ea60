"""Events of a task and the changes that Watch reads from their records."""

from __future__ import annotations

from postroad.v1 import events_pb2 as ev
from services.api.watch.changes import Change, change_of
from services.common.events import Event, encode, task_id
from services.common.kafka.topic_partition import TopicPartition

__all__ = ["MADE_MS", "RETRIED", "life", "mail", "read"]

MADE_MS = 1_790_000_000_000
RETRIED = MADE_MS + 500


def mail(number: int = 0) -> ev.MailTask:
    id_ = MADE_MS.to_bytes(6, "big") + number.to_bytes(10, "big")
    return ev.MailTask(
        id=id_, tenant="default", email=f"a{number}@x.test", domain="x.test", subject="s", body="b",
        labels={"list": "news", "n": str(number)}, created_at_us=MADE_MS * 1000,
    )  # fmt: skip


def life(task: ev.MailTask) -> list[Event]:
    """The events of one task in order: each stage defers it, it fails, is retried and is sent."""
    id_, at = task.id, MADE_MS * 1000
    return [
        ev.TaskCreated(task=task, at_us=at),
        ev.MailDeferred(id=id_, attempt=1, stage="validator", at_us=at + 1),
        ev.MxOk(task=task, attempt=2, at_us=at + 2),
        ev.MailDeferred(id=id_, attempt=1, stage="sender", in_doubt=True, at_us=at + 3),
        ev.MailDeferred(id=id_, attempt=1, stage="sender", at_us=at + 4),
        ev.MailDeferred(id=id_, attempt=2, stage="sender", at_us=at + 5),
        ev.MailFailed(id=id_, attempt=3, at_us=at + 6),
        ev.TaskCreated(task=task, epoch=RETRIED, at_us=RETRIED * 1000),
        ev.MxOk(task=task, epoch=RETRIED, attempt=1, at_us=RETRIED * 1000 + 1),
        ev.MailSent(id=id_, epoch=RETRIED, attempt=1, at_us=RETRIED * 1000 + 2),
    ]


def read(event: Event, offset: int = 0, at_ms: int = 0, replayed: bool = False) -> Change:
    record = encode(event, "test")
    partition = TopicPartition(record.topic, task_id(event)[-1] % 2)
    return change_of(record.value, replayed, partition, offset, at_ms)
