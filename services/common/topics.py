"""The only place that names topics, groups, partitions and retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.common.config import Settings

__all__ = [
    "EVENT_TOPICS",
    "MAIL_DEFERRED",
    "MAIL_FAILED",
    "MAIL_SENT",
    "MAX_RECORD_BYTES",
    "MX_FAILED",
    "MX_OK",
    "READ_BY",
    "TASK_CANCELLED",
    "TASK_CREATED",
    "Names",
    "Topic",
    "wanted",
]

TASK_CREATED = "task.created"
MX_OK = "mx.ok"
MX_FAILED = "mx.failed"
MAIL_SENT = "mail.sent"
MAIL_DEFERRED = "mail.deferred"
MAIL_FAILED = "mail.failed"
TASK_CANCELLED = "task.cancelled"

EVENT_TOPICS = (TASK_CREATED, MX_OK, MX_FAILED, MAIL_SENT, MAIL_DEFERRED, MAIL_FAILED, TASK_CANCELLED)
READ_BY: Mapping[str, tuple[str, ...]] = {
    "validator": (TASK_CREATED,),
    "sender": (MX_OK, TASK_CANCELLED),
    "status": EVENT_TOPICS,
}

# The largest body allowed by the settings (2 MiB), its headers and its envelope fit twice over.
MAX_RECORD_BYTES = 5 << 20

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic as it must be: its name, its partitions and its broker settings."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Names:
    """Topic and group names of one installation, its prefix included."""

    prefix: str = ""

    def topic(self, name: str) -> str:
        """Return the full name of an event topic."""
        return self.prefix + name

    def group(self, stage: str) -> str:
        """Return the consumer group of a stage."""
        return f"{self.prefix}postroad.{stage}"

    def delay(self, stage: str, seconds: int) -> str:
        """Return the stage's delay topic for a delay in seconds."""
        return f"{self.prefix}{stage}.delay.{seconds}"

    def dead(self, stage: str) -> str:
        """Return the stage's dead-letter topic."""
        return f"{self.prefix}{stage}.dead"


def wanted(settings: Settings) -> Sequence[Topic]:
    """Return every topic that an installation with these settings needs.

    Event topics keep 30 days, what a rebuild and a replay read; delay topics twice their longest stay
    and at least a week, so that an outage loses nothing; dead letters a year.
    """
    names = Names(settings.topic_prefix)
    base = {
        "cleanup.policy": "delete",
        "max.message.bytes": str(MAX_RECORD_BYTES),
        "min.insync.replicas": str(max(1, settings.replication - 1)),
    }

    def topic(name: str, days: int) -> Topic:
        config = base | {"retention.ms": str(days * _DAY_MS)}
        return Topic(name, settings.partitions, settings.replication, config)

    delays = {"validator": settings.validator_delays, "sender": settings.sender_delays}
    return [
        *(topic(names.topic(name), 30) for name in EVENT_TOPICS),
        *(
            topic(names.delay(stage, s), max(7, 2 * s // 86400))
            for stage, all_ in delays.items()
            for s in all_
        ),
        *(topic(names.dead(stage), 365) for stage in READ_BY),
    ]
