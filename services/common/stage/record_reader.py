"""Makes in-flight records of fetched messages, and says which partitions of delay topics to hold.

A partition is held until its head is due; flow_control.py pauses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from services.common.config import Settings
from services.common.events import Event, Undecodable
from services.common.kafka.headers import parse_attempt, parse_delayed_headers, parse_origin, read_headers
from services.common.kafka.records import Headers, MalformedHeaders, traceparent
from services.common.kafka.topics import Names
from services.common.stage.head_holds import held_until
from services.common.stage.in_flight_record import Assignment, InFlightRecord
from services.common.stage.partition_tracker import PartitionTracker
from services.common.stage.types import Stage

__all__ = ["KafkaMessage", "RecordReader"]

Decoder = Callable[[bytes | None], Event]

# How exactly FirstSeen remembers when a record came, as a part of the delay. It bounds FirstSeen's memory.
_GRAIN = 0.02


class KafkaMessage(Protocol):
    """What is read of a fetched message, as confluent_kafka.Message has it."""

    def topic(self) -> Any: ...
    def partition(self) -> Any: ...
    def offset(self) -> Any: ...
    def key(self) -> Any: ...
    def value(self) -> Any: ...
    def headers(self) -> Any: ...


class RecordReader:
    """Reads the messages of one stage. `topics` are the full names of all topics that the stage reads.

    `now_ms` returns the Unix time in milliseconds, with which due times are compared. `now` returns seconds
    of a monotonic clock.
    """

    def __init__(
        self,
        stage: Stage,
        settings: Settings,
        tracker: PartitionTracker,
        now_ms: Callable[[], int] | None = None,
        now: Callable[[], float] | None = None,
    ) -> None:
        names = Names(settings.topic_prefix)
        self._tracker = tracker
        self._decoders: Mapping[str, Decoder] = stage.decoders
        self._events = {names.topic(name): (name, stage.decoders[name]) for name in stage.topics}
        bare = Names()
        self._delays = {
            names.delay(stage.name, delay): (bare.delay(stage.name, delay), delay) for delay in stage.delays
        }
        self.topics = [*self._events, *self._delays]
        self._now_ms = now_ms or (lambda: int(time.time() * 1000))
        self._now = now or time.monotonic
        self._held: set[Assignment] = set()
        self._new_holds: list[tuple[Assignment, int]] = []

    @property
    def delays(self) -> Mapping[str, int]:
        """The seconds of each delay topic, by its full name."""
        return {topic: delay for topic, (_, delay) in self._delays.items()}

    @property
    def held(self) -> int:
        """How many partitions are held until their head is due."""
        return len(self._held)

    def read(self, message: KafkaMessage) -> InFlightRecord | None:
        """Return the message as a record; one that cannot be decoded has a reason in `undecodable`.

        Return None where nobody is to handle it now: its partition is no longer owned, or is held.
        """
        topic = message.topic()
        assignment = self._tracker.find(topic, message.partition())
        if assignment is None or assignment.held_until is not None:
            return None
        try:
            headers = read_headers(message)
        except MalformedHeaders as error:
            name = self._events[topic][0] if topic in self._events else self._delays[topic][0]
            return _unreadable(message, assignment, name, str(error))
        found = self._events.get(topic)
        if found is None:
            return self._read_delayed(message, assignment, headers, *self._delays[topic])
        name, decode = found
        value = message.value()
        event, undecodable = _decode(decode, value)
        trace = traceparent(headers)
        # By position: each record of a stage passes here.
        return InFlightRecord(
            assignment, message.offset(), name, message.key(), value, headers, event, trace, undecodable
        )

    def pop_new_holds(self) -> list[tuple[Assignment, int]]:
        """Return the partitions held since the last call, each with the offset of its head.

        The caller must pause them and seek back to the head: `read` took nothing from the head on.
        """
        new_holds, self._new_holds = self._new_holds, []
        return new_holds

    def note_end(self, assignment: Assignment, end: int) -> None:
        """Note that a held partition now has all records below the offset `end`."""
        delay = self._delays[assignment.topic][1]
        assignment.first_seen.note(end, self._now(), delay * _GRAIN)

    def end_due_holds(self) -> list[Assignment]:
        """End the hold of the partitions whose head is to be read again, and return them."""
        if not self._held:
            return []
        now = self._now()
        due = [a for a in self._held if a.held_until is not None and a.held_until <= now]
        for assignment in due:
            assignment.held_until = None
            self._held.discard(assignment)
        return due

    def drop_holds(self, assignments: Iterable[Assignment]) -> None:
        """Forget the holds of assignments that ended."""
        self._held.difference_update(assignments)

    def seconds_until_due(self, most: float) -> float:
        """Return the seconds until the next hold ends, at most `most`."""
        if not self._held:
            return most
        first = min(a.held_until or 0 for a in self._held)
        return min(most, max(0.0, first - self._now()))

    def _read_delayed(
        self, message: KafkaMessage, assignment: Assignment, headers: Headers, name: str, delay: int
    ) -> InFlightRecord | None:
        offset = message.offset()
        # Others may follow it.
        assignment.turn_at = None
        record = InFlightRecord(
            assignment=assignment,
            offset=offset,
            topic=name,
            key=message.key(),
            value=message.value(),
            headers=headers,
            traceparent=traceparent(headers),
        )
        try:
            delayed = parse_delayed_headers(headers)
            now = self._now()
            since = assignment.first_seen.since(offset, now)
            until = held_until(delayed.due_at_ms, delay, self._now_ms(), now, since)
            if until is not None:
                assignment.first_seen.note(offset + 1, now, delay * _GRAIN)
                self._hold(assignment, offset, until)
                return None
            if delayed.origin.topic not in self._decoders:
                raise MalformedHeaders(f"its origin {delayed.origin.topic} is not read here")
        except MalformedHeaders as error:
            record.undecodable = f"delayed record: {error}"
            # The dead letter keeps what can be read, so that it can be redriven.
            with suppress(MalformedHeaders):
                record.origin = parse_origin(headers)
            with suppress(MalformedHeaders):
                record.attempt = parse_attempt(headers)
            return record
        record.topic, record.origin, record.attempt = delayed.origin.topic, delayed.origin, delayed.attempt
        event, record.undecodable = _decode(self._decoders[record.topic], record.value)
        if event is not None:
            record.event = event
        return record

    def _hold(self, assignment: Assignment, offset: int, until: float) -> None:
        assignment.held_until = until
        self._held.add(assignment)
        self._new_holds.append((assignment, offset))


def _unreadable(message: KafkaMessage, assignment: Assignment, name: str, undecodable: str) -> InFlightRecord:
    return InFlightRecord(
        assignment=assignment,
        offset=message.offset(),
        topic=name,
        key=message.key(),
        value=message.value(),
        headers=None,
        undecodable=undecodable,
    )


def _decode(decode: Decoder, value: bytes | None) -> tuple[Event | None, str | None]:
    """Return the event and None, or None and why the value is no event."""
    try:
        return decode(value), None
    except Undecodable as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
