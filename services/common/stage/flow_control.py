"""Pauses and resumes the Consumer's partitions, and seeks a held one back to its head.

The poller's thread alone uses it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import confluent_kafka

from services.common.stage import metrics
from services.common.stage.delay_rests import DelayRests
from services.common.stage.in_flight_record import Assignment
from services.common.stage.partition_tracker import PartitionTracker
from services.common.stage.record_reader import RecordReader

__all__ = ["FlowControl"]

# How long the poller may go without fetching before it pauses. A pause discards what was prefetched, and a
# resumed partition brings nothing for up to 200 ms. Mostly capacity returns sooner.
_PAUSE_GRACE = 0.25


class _PausableConsumer(Protocol):
    def pause(self, partitions: list[confluent_kafka.TopicPartition]) -> None: ...
    def resume(self, partitions: list[confluent_kafka.TopicPartition]) -> None: ...
    def seek(self, partition: confluent_kafka.TopicPartition) -> None: ...
    def get_watermark_offsets(self, partition: confluent_kafka.TopicPartition, *, cached: bool) -> Any: ...


class FlowControl:
    """Pauses all partitions while there is no capacity, and a delay topic's until their head is due.

    Partitions of delay topics on which no record is known rest in between.
    """

    consumer: _PausableConsumer

    def __init__(self, tracker: PartitionTracker, reader: RecordReader, stage: str) -> None:
        self._tracker, self._reader = tracker, reader
        self._rests = DelayRests(reader.delays)
        self._saturated_since: float | None = None
        self._paused_gauge = metrics.STAGE_PAUSED.labels(stage)
        self._held_gauge = metrics.STAGE_HELD.labels(stage)
        self.all_paused = False
        """Whether every partition is paused."""

    def on_saturated(self, now: float) -> None:
        """Pause every partition, once there was no capacity for a while (`now`: monotonic seconds)."""
        if self._saturated_since is None:
            self._saturated_since = now
        if now - self._saturated_since > _PAUSE_GRACE:
            self.pause_all()

    def on_capacity(self) -> None:
        """Resume every partition that is not held."""
        self._saturated_since = None
        self._set_all_paused(False)

    def pause_all(self) -> None:
        """Pause every partition."""
        self._set_all_paused(True)

    def on_assign(self, partitions: list[confluent_kafka.TopicPartition]) -> None:
        """Resume partitions that were just assigned, or pause them where all are paused."""
        if partitions:
            # librdkafka keeps a pause across assignments: a partition that left paused would stay paused.
            self.consumer.resume(partitions)
        if self.all_paused:
            self._apply(self._tracker.owned())

    def hold_back(self) -> None:
        """Pause the partitions that the reader holds since the last call, and seek back to their head."""
        held = self._reader.pop_new_holds()
        for assignment, offset in held:
            self._apply([assignment])
            head = confluent_kafka.TopicPartition(assignment.topic, assignment.partition, offset)
            self.consumer.seek(head)
            # The last fetch said where the partition ends, so this asks no broker.
            _, end = self.consumer.get_watermark_offsets(head, cached=True)
            self._reader.note_end(assignment, end)
        if held:
            self._held_gauge.set(self._reader.held)

    def resume_due(self) -> None:
        """Resume the held partitions whose head is due by now."""
        due = self._reader.end_due_holds()
        if due:
            self._held_gauge.set(self._reader.held)
            self._apply(due)

    def let_rest(self, now: float) -> None:
        """Begin and end the rests of quiet partitions (`now`: monotonic seconds)."""
        if changed := self._rests.turn(self._tracker.owned, now):
            self._apply(changed)

    def _set_all_paused(self, paused: bool) -> None:
        if paused != self.all_paused:
            self.all_paused = paused
            self._paused_gauge.set(paused)
            # What was paused was not looked at.
            self._rests.wake(self._tracker.owned())
            self._apply(self._tracker.owned())

    def _apply(self, assignments: Collection[Assignment]) -> None:
        pause: list[confluent_kafka.TopicPartition] = []
        resume: list[confluent_kafka.TopicPartition] = []
        for assignment in assignments:
            if not assignment.live:
                continue
            wanted = self.all_paused or assignment.held_until is not None or assignment.resting
            if wanted != assignment.paused:
                assignment.paused = wanted
                partition = confluent_kafka.TopicPartition(assignment.topic, assignment.partition)
                (pause if wanted else resume).append(partition)
        if pause:
            self.consumer.pause(pause)
        if resume:
            self.consumer.resume(resume)
