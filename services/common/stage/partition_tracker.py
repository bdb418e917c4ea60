"""Tracks a replica's partitions, their records in flight, and what to commit.

A record is in flight from its fetch until the handler runner releases it: finished, or unfinished for its
partition's next owner. Pure: no Kafka client, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.common.kafka.topic_partition import TopicPartition
from services.common.stage.in_flight_limit import InFlightLimit
from services.common.stage.in_flight_record import Assignment, InFlightRecord

__all__ = ["PartitionTracker"]


class PartitionTracker:
    """Knows every live assignment and every record in flight. Partitions carry full topic names."""

    def __init__(self, in_flight: InFlightLimit) -> None:
        self.in_flight = in_flight
        # Plain tuples equal a TopicPartition and are cheaper to make: each record looks its assignment up.
        self._live: dict[tuple[str, int], Assignment] = {}

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Begin a new assignment of each partition."""
        for topic, partition in partitions:
            self._live[topic, partition] = Assignment(topic, partition)

    def owned(self) -> list[Assignment]:
        """Return the live assignments."""
        return list(self._live.values())

    def find(self, topic: str, partition: int) -> Assignment | None:
        """Return the live assignment of a partition, None where this replica does not own it."""
        return self._live.get((topic, partition))

    def select(self, partitions: Iterable[TopicPartition]) -> list[Assignment]:
        """Return the live assignments among these partitions."""
        return [self._live[p] for p in partitions if p in self._live]

    def release_partitions(self, assignments: Iterable[Assignment]) -> None:
        """End these assignments: whatever becomes of their records no longer moves an offset."""
        for assignment in assignments:
            assignment.live = False
            if self._live.get((assignment.topic, assignment.partition)) is assignment:
                del self._live[assignment.topic, assignment.partition]

    def add(self, record: InFlightRecord) -> None:
        """Count a fetched record in."""
        record.assignment.offsets.add(record, record.offset)
        self.in_flight.add(record.size)

    def release(self, records: Iterable[InFlightRecord]) -> None:
        """Count records out. Those that are `finished` no longer hold back their assignment's offset."""
        for record in records:
            self.in_flight.remove(record.size)
            if record.finished and record.assignment.live:
                record.assignment.offsets.finish(record)

    def offsets_to_commit(self, assignments: Iterable[Assignment] | None = None) -> dict[Assignment, int]:
        """Return the offset to commit of each live assignment (among these, or of all) where it moved."""
        offsets = {}
        for assignment in self._live.values() if assignments is None else assignments:
            offset = assignment.offsets.to_commit()
            if assignment.live and offset is not None and offset != assignment.committed:
                offsets[assignment] = offset
        return offsets

    def mark_committed(self, offsets: Mapping[Assignment, int]) -> None:
        """Note that the coordinator acked these offsets."""
        for assignment, offset in offsets.items():
            assignment.committed = offset
