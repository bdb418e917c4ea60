"""What a replica owns, what it fetched from it, and what it may commit. Pure: no Kafka types, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from services.common.events import Event
from services.common.kafka.records import Headers
from services.common.kafka.topic_partition import RecordLocation, TopicPartition
from services.common.stage.delays import FirstSeen
from services.common.stage.inflight import InFlight
from services.common.stage.offsets import Offsets
from services.common.stage.types import Record

__all__ = ["Assignment", "Fetched", "Ledger"]

# What a record costs beside its value's two forms (bytes and message): headers, key, objects.
_OVERHEAD = 1024


class Assignment:
    """One assignment of one partition. A partition that comes back is another assignment."""

    __slots__ = ("committed", "first_seen", "held_until", "live", "offsets", "partition", "paused", "topic")

    def __init__(self, topic: str, partition: int) -> None:
        self.topic, self.partition = topic, partition
        self.live = True
        self.offsets = Offsets()
        self.committed: int | None = None
        self.paused = False
        # Of a delay topic: when its records came, and until when it is held, both in monotonic seconds.
        self.first_seen = FirstSeen()
        self.held_until: float | None = None


class Fetched(Record):
    """A record with what the runtime must know of it.

    `fault` says why it cannot be handled, and then there is no `event`. `finished` is set once all that
    it gave rise to is acked.
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
        self.size = 2 * len(value or b"") + _OVERHEAD


class Ledger:
    """Every assignment that is live and every record that is in flight."""

    def __init__(self, in_flight: InFlight) -> None:
        self.in_flight = in_flight
        # Keyed by plain tuples, which equal a TopicPartition: every record is looked up here.
        self._live: dict[tuple[str, int], Assignment] = {}

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Begin a new assignment of each."""
        for topic, partition in partitions:
            self._live[topic, partition] = Assignment(topic, partition)

    def owned(self) -> list[Assignment]:
        """Return the live assignments."""
        return list(self._live.values())

    def find(self, topic: str, partition: int) -> Assignment | None:
        """Return the live assignment of a partition, None where it is not owned."""
        return self._live.get((topic, partition))

    def select(self, partitions: Iterable[TopicPartition]) -> list[Assignment]:
        """Return the live assignments among these partitions."""
        return [self._live[p] for p in partitions if p in self._live]

    def let_go(self, assignments: Iterable[Assignment]) -> None:
        """End these assignments: nothing that happens to their records matters from now on."""
        for assignment in assignments:
            assignment.live = False
            if self._live.get((assignment.topic, assignment.partition)) is assignment:
                del self._live[assignment.topic, assignment.partition]

    def take(self, record: Fetched) -> None:
        """Count a fetched record in."""
        record.assignment.offsets.seen(record, record.offset)
        self.in_flight.add(record.size)

    def give_back(self, records: Iterable[Fetched]) -> None:
        """Count records out; those that are `finished` no longer hold back their assignment's commit."""
        for record in records:
            self.in_flight.remove(record.size)
            if record.finished and record.assignment.live:
                record.assignment.offsets.finish(record)

    def to_commit(self, assignments: Iterable[Assignment] | None = None) -> dict[Assignment, int]:
        """Return the positions not yet committed, of live assignments only (of these, or of all)."""
        positions = {}
        for assignment in self._live.values() if assignments is None else assignments:
            position = assignment.offsets.position()
            if assignment.live and position is not None and position != assignment.committed:
                positions[assignment] = position
        return positions

    def committed(self, positions: Mapping[Assignment, int]) -> None:
        """Note that these positions were committed."""
        for assignment, position in positions.items():
            assignment.committed = position
