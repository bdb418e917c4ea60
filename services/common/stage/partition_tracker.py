"""Tracks a replica's partitions (Assignment), their records in flight (InFlightRecord) and what to commit.

A record is in flight from its fetch until the handler runner releases it: finished, or unfinished for its
partition's next owner. Pure: no Kafka client, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from services.common.events import Event
from services.common.kafka.records import Headers
from services.common.kafka.topic_partition import RecordLocation, TopicPartition
from services.common.stage.delays import FirstSeen
from services.common.stage.in_flight_limit import InFlightLimit
from services.common.stage.offset_tracker import OffsetTracker
from services.common.stage.types import Record

__all__ = ["Assignment", "InFlightRecord", "PartitionTracker"]

# What a record takes in memory beside its value's two forms (bytes and message): headers, key, objects.
_OVERHEAD_BYTES = 1024


class Assignment:
    """One assignment of one partition (full topic name). Assigned again, a partition is another Assignment.

    `live` until the partition is revoked or lost; `committed` is the offset last committed, if any; `paused`
    while the consumer fetches nothing from it. For a delay topic, `first_seen` knows when its records came.
    `held_until` is until when its head is not due (monotonic seconds), None while it is read.
    """

    __slots__ = ("committed", "first_seen", "held_until", "live", "offsets", "partition", "paused", "topic")

    def __init__(self, topic: str, partition: int) -> None:
        self.topic, self.partition = topic, partition
        self.live = True
        self.offsets = OffsetTracker()
        self.committed: int | None = None
        self.paused = False
        self.first_seen = FirstSeen()
        self.held_until: float | None = None


class InFlightRecord(Record):
    """A Record with what the runtime must know of it.

    `fault` says why no handler can have it; then there is no `event`. `origin` is where a delayed record was
    at first. `finished` is set once all records that it led to are acked. `size` is what it takes, in bytes.
    """

    __slots__ = ("assignment", "fault", "finished", "headers", "offset", "origin", "size", "value")

    def __init__(
        self,
        *,
        assignment: Assignment,
        offset: int,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None,
        event: Event | None = None,
        origin: RecordLocation | None = None,
        attempt: int = 1,
        traceparent: bytes | None = None,
        fault: str | None = None,
    ) -> None:
        self.assignment, self.offset, self.origin = assignment, offset, origin
        self.topic, self.key, self.value, self.headers = topic, key, value, headers
        self.event = cast(Event, event)
        self.attempt, self.traceparent, self.fault = attempt, traceparent, fault
        self.finished = False
        self.size = 2 * len(value or b"") + _OVERHEAD_BYTES


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
