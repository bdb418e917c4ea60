"""Handles assigned, revoked and lost partitions. librdkafka calls it inside poll, consume and close.

So it runs on the poller's thread, which does not poll meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import confluent_kafka
import structlog
from confluent_kafka import Consumer, KafkaException

from services.common.kafka.topic_partition import TopicPartition
from services.common.stage import metrics
from services.common.stage.flow_control import FlowControl
from services.common.stage.in_flight_record import Assignment
from services.common.stage.membership import Membership
from services.common.stage.offset_committer import OffsetCommitter
from services.common.stage.partition_tracker import PartitionTracker
from services.common.stage.record_reader import RecordReader

__all__ = ["RebalanceHandler"]

log = structlog.get_logger(__name__)


class RebalanceHandler:
    """Begins and ends the assignments of one stage.

    `wait_until_released` blocks until these assignments have no record in flight, or until a deadline
    (monotonic seconds). `cancel` stops their handlers in so many seconds. `stopping` says whether the stage
    drains: a revocation then waits for nothing.
    """

    def __init__(
        self,
        tracker: PartitionTracker,
        reader: RecordReader,
        committer: OffsetCommitter,
        flow_control: FlowControl,
        membership: Membership,
        *,
        stage: str,
        revoke_seconds: float,
        wait_until_released: Callable[[Collection[Assignment], float], None],
        cancel: Callable[[Collection[Assignment], float], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._tracker, self._reader, self._committer = tracker, reader, committer
        self._flow_control, self._membership = flow_control, membership
        self._stage, self._revoke_seconds = stage, revoke_seconds
        self._wait_until_released, self._cancel, self._stopping = wait_until_released, cancel, stopping
        self._owned_gauge = metrics.STAGE_PARTITIONS.labels(stage)

    def on_assign(self, consumer: Consumer, partitions: list[confluent_kafka.TopicPartition]) -> None:
        """Begin an assignment of each partition."""
        self._note("assigned", partitions)
        self._tracker.assign(_keys(partitions))
        consumer.incremental_assign(partitions)
        self._flow_control.on_assign(partitions)
        self._membership.on_assign()
        self._owned_gauge.set(len(self._tracker.owned()))

    def on_revoke(self, consumer: Consumer, partitions: list[confluent_kafka.TopicPartition]) -> None:
        """Wait for the records in flight, commit, and release the partitions. Blocks."""
        self._note("revoked", partitions)
        leaving = self._tracker.select(_keys(partitions))
        deadline = time.monotonic() + (0 if self._stopping() else self._revoke_seconds)
        self._wait_until_released(leaving, deadline)
        unfinished = [assignment for assignment in leaving if len(assignment.offsets)]
        self._committer.commit_now(leaving, deadline)
        self._release(leaving)
        if unfinished:
            log.warning("partitions revoked with records unfinished", partitions=len(unfinished))
            self._cancel(unfinished, 0)
        _unassign(consumer, partitions)

    def on_lost(self, consumer: Consumer, partitions: list[confluent_kafka.TopicPartition]) -> None:
        """Release the partitions without a commit: another replica may own them by now."""
        self._note("lost", partitions)
        leaving = self._tracker.select(_keys(partitions))
        self._membership.on_lost()
        self._release(leaving)
        # Handlers may end all the same, as when partitions are revoked: to be cut off in the middle is what
        # leaves a mail in doubt.
        self._cancel(leaving, self._revoke_seconds)
        _unassign(consumer, partitions)

    def release_all(self) -> None:
        """Release whatever a closed Consumer has left assigned, and cancel its handlers."""
        if leaving := self._tracker.owned():
            self._release(leaving)
            self._cancel(leaving, 0)

    def _release(self, leaving: list[Assignment]) -> None:
        self._tracker.release_partitions(leaving)
        self._reader.drop_holds(leaving)
        self._owned_gauge.set(len(self._tracker.owned()))

    def _note(self, kind: str, partitions: list[confluent_kafka.TopicPartition]) -> None:
        metrics.STAGE_REBALANCES.labels(self._stage, kind).inc()
        log.info("partitions " + kind, stage=self._stage, count=len(partitions))


def _unassign(consumer: Consumer, partitions: list[confluent_kafka.TopicPartition]) -> None:
    """Unassign those of these partitions that are assigned. If that failed, close would hang."""
    try:
        consumer.incremental_unassign(partitions)
    except KafkaException:
        # librdkafka refuses the whole list where one partition is not assigned.
        assigned = set(_keys(consumer.assignment()))
        there = [p for p in partitions if TopicPartition(p.topic, p.partition) in assigned]
        log.warning("revoked partitions were not assigned", count=len(partitions) - len(there))
        consumer.incremental_unassign(there)


def _keys(partitions: list[confluent_kafka.TopicPartition]) -> list[TopicPartition]:
    return [TopicPartition(partition.topic, partition.partition) for partition in partitions]
