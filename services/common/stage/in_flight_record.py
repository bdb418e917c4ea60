"""A record in flight (InFlightRecord), and the assignment of its partition. Pure."""

from __future__ import annotations

from services.common.events import Event
from services.common.kafka.records import Headers
from services.common.kafka.topic_partition import RecordLocation
from services.common.stage.head_holds import FirstSeen
from services.common.stage.offset_tracker import OffsetTracker
from services.common.stage.types import Record

__all__ = ["Assignment", "InFlightRecord"]

# What a record takes in memory beside its value's two forms (bytes and message): headers, key, objects.
_OVERHEAD_BYTES = 1024


class Assignment:
    """One assignment of one partition (full topic name). Assigned again, a partition is another Assignment.

    `live` until the partition is revoked or lost; `committed` is the offset last committed, if any; `paused`
    while the consumer fetches nothing from it. For a delay topic, `first_seen` knows when its records came.
    `held_until` is until when its head is not due (monotonic seconds), None while it is read. While an empty
    partition of a delay topic is `resting`, the consumer does not fetch it. `turn_at` is when its next rest
    or look begins; None: it is new, or brought a record. `looks` counts the looks.
    """

    __slots__ = (
        *("committed", "first_seen", "held_until", "live", "looks", "offsets", "partition", "paused"),
        *("resting", "topic", "turn_at"),
    )

    def __init__(self, topic: str, partition: int) -> None:
        self.topic, self.partition = topic, partition
        self.live = True
        self.offsets = OffsetTracker()
        self.committed: int | None = None
        self.paused = False
        self.first_seen = FirstSeen()
        self.held_until: float | None = None
        self.resting = False
        self.turn_at: float | None = None
        self.looks = 0


class InFlightRecord(Record):
    """A Record with what the runtime must know of it.

    `undecodable` says why no handler can have it; then there is no `event`. `origin` is where a delayed
    record was at first. `finished` is set once all records that it led to are acked. `size` is what it takes,
    in bytes.
    """

    __slots__ = ("assignment", "finished", "headers", "offset", "origin", "size", "undecodable")

    def __init__(  # noqa: PLR0917 - the reader passes them by position, for speed
        self,
        assignment: Assignment,
        offset: int,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None,
        event: Event | None = None,
        traceparent: bytes | None = None,
        undecodable: str | None = None,
        origin: RecordLocation | None = None,
        attempt: int = 1,
    ) -> None:
        self.assignment = assignment
        self.offset = offset
        self.topic = topic
        self.key = key
        self.value = value
        self.headers = headers
        self.event = event  # type: ignore[assignment]
        self.traceparent = traceparent
        self.undecodable = undecodable
        self.origin = origin
        self.attempt = attempt
        self.finished = False
        self.size = 2 * len(value or b"") + _OVERHEAD_BYTES
