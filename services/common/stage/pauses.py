"""Which partitions are paused. Used on the poller's thread alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import confluent_kafka

from services.common.stage import metrics
from services.common.stage.intake import Intake
from services.common.stage.ledger import Assignment, Ledger

__all__ = ["Pauses"]

# How long intake may rest without pausing. A pause throws away what was prefetched, and a resumed
# partition brings nothing for up to 200 ms; mostly there is room again before that.
_PATIENCE = 0.25


class _Pausable(Protocol):
    def pause(self, partitions: list[confluent_kafka.TopicPartition]) -> None: ...
    def resume(self, partitions: list[confluent_kafka.TopicPartition]) -> None: ...
    def seek(self, partition: confluent_kafka.TopicPartition) -> None: ...
    def get_watermark_offsets(self, partition: confluent_kafka.TopicPartition, *, cached: bool) -> Any: ...


class Pauses:
    """Pauses all partitions while there is no room, and those of delay topics until their head is due."""

    consumer: _Pausable

    def __init__(self, ledger: Ledger, intake: Intake, stage: str) -> None:
        self._ledger, self._intake = ledger, intake
        self._full_since: float | None = None
        self._resting_gauge = metrics.STAGE_PAUSED.labels(stage)
        self._held_gauge = metrics.STAGE_HELD.labels(stage)
        self.resting = False
        """Whether all are paused."""

    def no_room(self, now: float) -> None:
        """Pause all, once there has been no room for a while (`now`: monotonic seconds)."""
        if self._full_since is None:
            self._full_since = now
        if now - self._full_since > _PATIENCE:
            self.rest()

    def room(self) -> None:
        """Resume all but the held."""
        self._full_since = None
        self._set(False)

    def rest(self) -> None:
        """Pause all."""
        self._set(True)

    def assigned(self, partitions: list[confluent_kafka.TopicPartition]) -> None:
        """Bring partitions that were just assigned into line."""
        if partitions:
            # librdkafka remembers a pause across assignments: a partition that left paused would stay so.
            self.consumer.resume(partitions)
        if self.resting:
            self._apply(self._ledger.owned())

    def hold(self) -> None:
        """Take partitions whose head was found not to be due back to it, and pause them."""
        held = self._intake.take_held()
        for assignment, offset in held:
            self._apply([assignment])
            head = confluent_kafka.TopicPartition(assignment.topic, assignment.partition, offset)
            self.consumer.seek(head)
            # As the last fetch said: no question to the broker.
            _, end = self.consumer.get_watermark_offsets(head, cached=True)
            self._intake.saw(assignment, end)
        if held:
            self._held_gauge.set(self._intake.held)

    def release(self) -> None:
        """Resume partitions whose head is due by now."""
        due = self._intake.release()
        if due:
            self._held_gauge.set(self._intake.held)
            self._apply(due)

    def _set(self, resting: bool) -> None:
        if resting != self.resting:
            self.resting = resting
            self._resting_gauge.set(resting)
            self._apply(self._ledger.owned())

    def _apply(self, assignments: Collection[Assignment]) -> None:
        pause: list[confluent_kafka.TopicPartition] = []
        resume: list[confluent_kafka.TopicPartition] = []
        for assignment in assignments:
            if not assignment.live:
                continue
            wanted = self.resting or assignment.held_until is not None
            if wanted != assignment.paused:
                assignment.paused = wanted
                (pause if wanted else resume).append(
                    confluent_kafka.TopicPartition(assignment.topic, assignment.partition)
                )
        if pause:
            self.consumer.pause(pause)
        if resume:
            self.consumer.resume(resume)
