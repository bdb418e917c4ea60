"""From a Kafka message to a record: decoding, and holding back what is not yet due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from services.common.config import Settings
from services.common.events import Event, Undecodable
from services.common.kafka.headers import parse_attempt, parse_delayed_headers, parse_origin
from services.common.kafka.records import Headers, MalformedHeaders, read_headers, traceparent
from services.common.kafka.topics import Names
from services.common.stage.delays import hold
from services.common.stage.ledger import Assignment, Fetched, Ledger
from services.common.stage.types import Stage

__all__ = ["Intake", "RawMessage"]

Decoder = Callable[[bytes | None], Event]

# A part of the delay: how exactly it is remembered when a record came. It bounds what is remembered.
_GRAIN = 0.02


class RawMessage(Protocol):
    """What is read of a message; confluent_kafka's has these."""

    def topic(self) -> Any: ...
    def partition(self) -> Any: ...
    def offset(self) -> Any: ...
    def key(self) -> Any: ...
    def value(self) -> Any: ...
    def headers(self) -> Any: ...


class Intake:
    """Reads a stage's messages. `topics` are the full names of all that the stage reads.

    `now_ms` is the clock (Unix milliseconds) that due times are compared with, `now` one that nobody sets
    (seconds).
    """

    def __init__(
        self,
        stage: Stage,
        settings: Settings,
        ledger: Ledger,
        now_ms: Callable[[], int] | None = None,
        now: Callable[[], float] | None = None,
    ) -> None:
        names = Names(settings.topic_prefix)
        self._ledger = ledger
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
        self._to_hold: list[tuple[Assignment, int]] = []

    @property
    def held(self) -> int:
        """How many partitions are held until their head is due."""
        return len(self._held)

    def read(self, message: RawMessage) -> Fetched | None:
        """Return the message as a record; one that cannot be decoded has a `fault`.

        None where it is not to be handled now: its partition is not owned any more, or is held.
        """
        topic = message.topic()
        assignment = self._ledger.find(topic, message.partition())
        if assignment is None or assignment.held_until is not None:
            return None
        try:
            headers = read_headers(message)
        except MalformedHeaders as error:
            name = self._events[topic][0] if topic in self._events else self._delays[topic][0]
            return _unreadable(message, assignment, name, str(error))
        found = self._events.get(topic)
        if found is None:
            return self._delayed(message, assignment, headers, *self._delays[topic])
        name, decode = found
        value = message.value()
        event, fault = _decoded(decode, value)
        return Fetched(
            assignment=assignment,
            offset=message.offset(),
            topic=name,
            key=message.key(),
            value=value,
            headers=headers,
            event=event,
            traceparent=traceparent(headers),
            fault=fault,
        )

    def take_held(self) -> list[tuple[Assignment, int]]:
        """Return the partitions that were found held since the last call, with their head's offset.

        The caller must pause them and seek back to the head: nothing from it on was taken.
        """
        to_hold, self._to_hold = self._to_hold, []
        return to_hold

    def saw(self, assignment: Assignment, end: int) -> None:
        """Note that a held partition has all records below the offset `end`."""
        delay = self._delays[assignment.topic][1]
        assignment.first_seen.note(end, self._now(), delay * _GRAIN)

    def release(self) -> list[Assignment]:
        """End the hold of partitions whose head is to be looked at again, and return them."""
        if not self._held:
            return []
        now = self._now()
        due = [a for a in self._held if a.held_until is not None and a.held_until <= now]
        for assignment in due:
            assignment.held_until = None
            self._held.discard(assignment)
        return due

    def forget(self, assignments: Iterable[Assignment]) -> None:
        """Drop the holds of assignments that ended."""
        self._held.difference_update(assignments)

    def wait(self, most: float) -> float:
        """Return the seconds until the next hold ends, at most `most`."""
        if not self._held:
            return most
        first = min(a.held_until or 0 for a in self._held)
        return min(most, max(0.0, first - self._now()))

    def _delayed(
        self, message: RawMessage, assignment: Assignment, headers: Headers, name: str, delay: int
    ) -> Fetched | None:
        offset = message.offset()
        record = Fetched(
            assignment=assignment,
            offset=offset,
            topic=name,
            key=message.key(),
            value=message.value(),
            headers=headers,
            traceparent=traceparent(headers),
        )
        try:
            back = parse_delayed_headers(headers)
            now = self._now()
            until = hold(back.due_at_ms, delay, self._now_ms(), now, assignment.first_seen.since(offset, now))
            if until is not None:
                assignment.first_seen.note(offset + 1, now, delay * _GRAIN)
                self._hold(assignment, offset, until)
                return None
            if back.origin.topic not in self._decoders:
                raise MalformedHeaders(f"its origin {back.origin.topic} is not read here")
        except MalformedHeaders as error:
            record.fault = f"delayed record: {error}"
            # What can be read of it goes with the dead letter, which is sent back by it.
            with suppress(MalformedHeaders):
                record.origin = parse_origin(headers)
            with suppress(MalformedHeaders):
                record.attempt = parse_attempt(headers)
            return record
        record.topic, record.origin, record.attempt = back.origin.topic, back.origin, back.attempt
        event, record.fault = _decoded(self._decoders[record.topic], record.value)
        if event is not None:
            record.event = event
        return record

    def _hold(self, assignment: Assignment, offset: int, until: float) -> None:
        assignment.held_until = until
        self._held.add(assignment)
        self._to_hold.append((assignment, offset))


def _unreadable(message: RawMessage, assignment: Assignment, name: str, fault: str) -> Fetched:
    return Fetched(
        assignment=assignment,
        offset=message.offset(),
        topic=name,
        key=message.key(),
        value=message.value(),
        headers=None,
        fault=fault,
    )


def _decoded(decode: Decoder, value: bytes | None) -> tuple[Event | None, str | None]:
    """Return the event, or why there is none."""
    try:
        return decode(value), None
    except Undecodable as error:
        return None, str(error)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
