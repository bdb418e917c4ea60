"""Names every topic and consumer group, with partitions and retention.

Other modules only put the prefix before a bare name, or take it away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.common.config import Settings

__all__ = [
    "EVENT_TOPICS",
    "KEEP_DAYS",
    "MAIL_DEFERRED",
    "MAIL_FAILED",
    "MAIL_SENT",
    "MAX_RECORD_BYTES",
    "MX_FAILED",
    "MX_OK",
    "TASK_CANCELLED",
    "TASK_CREATED",
    "Names",
    "Topic",
    "delay_of",
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

# Twice the largest body that the settings allow (2 MiB), with its headers and its envelope.
MAX_RECORD_BYTES = 5 << 20

_DAY_MS = 86_400_000
# docs/operations.md promises that a stage which is down for so long loses nothing.
KEEP_DAYS = 30
"""How many days event topics keep their records."""
_KEEP_MS = KEEP_DAYS * _DAY_MS


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic as an installation wants it: full name, partitions, replicas and broker settings."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Names:
    """The full names of the topics and groups of one installation; without a prefix, the bare names."""

    prefix: str = ""

    def topic(self, name: str) -> str:
        """Return the full name of an event topic."""
        return self.prefix + name

    def group(self, stage: str) -> str:
        """Return the consumer group of a stage."""
        return f"{self.prefix}postroad.{stage}"

    @property
    def ungrouped(self) -> str:
        """The group id of consumers that join no group and commit nothing; librdkafka wants one."""
        return f"{self.prefix}postroad.cli"

    def delay(self, stage: str, seconds: int) -> str:
        """Return the stage's delay topic for a delay in seconds."""
        return f"{self.prefix}{stage}.delay.{seconds}"

    def dead(self, stage: str) -> str:
        """Return the stage's dead-letter topic."""
        return f"{self.prefix}{stage}.dead"


def delay_of(topic: str) -> int | None:
    """Return the delay in seconds of a delay topic (bare name), None for any other topic."""
    head, dot, seconds = topic.rpartition(".")
    return int(seconds) if dot and head.endswith(".delay") and seconds.isdigit() else None


def wanted(settings: Settings, delays: Mapping[str, Sequence[int]]) -> Sequence[Topic]:
    """Return every topic that an installation with these settings needs.

    `delays` has every stage by name, with the seconds of its delay topics (stages.py). Event
    topics keep their records for 30 days, for rebuilds and replays. Delay topics keep theirs for a task's age
    limit and 30 days more. So a stage that was down for 30 days still finds all that it had deferred. Dead
    letters stay for a year.
    """
    names = Names(settings.topic_prefix)
    base = {
        "cleanup.policy": "delete",
        "max.message.bytes": str(MAX_RECORD_BYTES),
        "min.insync.replicas": str(max(1, settings.replication - 1)),
        # Only time removes a record, whatever the brokers' default is.
        "retention.bytes": "-1",
    }

    def topic(name: str, keep_ms: int) -> Topic:
        config = base | {"retention.ms": str(keep_ms)}
        return Topic(name, settings.partitions, settings.replication, config)

    return [
        *(topic(names.topic(name), _KEEP_MS) for name in EVENT_TOPICS),
        *(
            # A delay may exceed the age limit; with its jitter a record waits less than twice as long.
            topic(names.delay(stage, s), 1000 * max(settings.sender_max_age, 2 * s) + _KEEP_MS)
            for stage, all_ in delays.items()
            for s in all_
        ),
        *(topic(names.dead(stage), 365 * _DAY_MS) for stage in delays),
    ]
