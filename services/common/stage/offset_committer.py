"""Commits the offsets that a PartitionTracker gives. The poller's thread alone uses it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import confluent_kafka
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException

from services.common.kafka.topic_partition import first_error
from services.common.stage import metrics
from services.common.stage.in_flight_record import Assignment
from services.common.stage.partition_tracker import PartitionTracker

__all__ = ["OffsetCommitter"]

log = structlog.get_logger(__name__)

# Seconds between two asynchronous commits, and between two tries of a synchronous one.
_INTERVAL = 0.5
_RETRY_PAUSE = 0.2
_TRIES = 3


class OffsetCommitter:
    """Commits asynchronously every half second, and synchronously where partitions leave.

    At most one asynchronous commit is under way, so that a resent older one never overtakes a newer one. A
    commit that fails is not repeated: the next one covers it. Only an acked offset counts as committed.
    """

    def __init__(self, tracker: PartitionTracker, stage: str) -> None:
        self._tracker, self._stage = tracker, stage
        self._under_way: Mapping[Assignment, int] | None = None
        self._next = 0.0
        self.acked_at = 0.0
        """When the coordinator last acked a commit, monotonic seconds."""
        self._failures = metrics.STAGE_COMMIT_FAILURES.labels(stage)

    def use(self, consumer: Consumer) -> None:
        """Commit through this Consumer from now on."""
        self._consumer = consumer
        self._under_way = None

    def commit_if_due(self, now: float) -> None:
        """Start to commit all offsets that moved, if it is time (`now`: monotonic seconds)."""
        if now < self._next or self._under_way is not None:
            return
        self._next = now + _INTERVAL
        offsets = self._tracker.offsets_to_commit()
        if not offsets:
            return
        try:
            self._consumer.commit(offsets=_partitions(offsets), asynchronous=True)
            self._under_way = offsets
        except KafkaException as error:
            self._on_failure(error.args[0])

    def on_commit(self, error: KafkaError | None, partitions: list[confluent_kafka.TopicPartition]) -> None:
        """Take the result of the asynchronous commit; librdkafka calls this inside poll."""
        offsets, self._under_way = self._under_way or {}, None
        error = error or first_error(partitions)
        if error is None:
            self._on_ack(offsets)
        else:
            self._on_failure(error)

    def commit_now(self, assignments: Collection[Assignment], deadline: float) -> None:
        """Commit the offsets of these assignments and wait for the result.

        Blocks. On a failure it tries again, up to three times in all; after the second try only before
        `deadline` (monotonic seconds).
        """
        for attempt in range(_TRIES):
            offsets = self._tracker.offsets_to_commit(assignments)
            if not offsets:
                return
            try:
                results = self._consumer.commit(offsets=_partitions(offsets), asynchronous=False)
                failure = first_error(results)
            except KafkaException as error:
                failure = error.args[0]
            if failure is None:
                self._on_ack(offsets)
                return
            self._on_failure(failure)
            if attempt and time.monotonic() >= deadline:
                return
            time.sleep(_RETRY_PAUSE)

    def _on_ack(self, offsets: Mapping[Assignment, int]) -> None:
        self.acked_at = time.monotonic()
        self._tracker.mark_committed(offsets)

    def _on_failure(self, error: KafkaError) -> None:
        self._failures.inc()
        log.warning("commit failed", stage=self._stage, error=str(error))


def _partitions(offsets: Mapping[Assignment, int]) -> list[confluent_kafka.TopicPartition]:
    return [confluent_kafka.TopicPartition(a.topic, a.partition, offset) for a, offset in offsets.items()]
