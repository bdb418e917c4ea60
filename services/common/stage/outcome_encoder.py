"""Encodes a handler's outcome as records: its events, and a delayed record or a dead letter. Pure."""

from __future__ import annotations

from services.common.events import encode
from services.common.kafka.headers import LeftOut, dead_letter_headers, delayed_headers
from services.common.kafka.records import OutgoingRecord
from services.common.kafka.topic_partition import RecordLocation
from services.common.kafka.topics import Names
from services.common.stage.in_flight_record import InFlightRecord
from services.common.stage.types import Dead, Done, Outcome, Retry, Stage

__all__ = ["ALL", "OutcomeEncoder"]

ALL = 2
"""The most that a dead letter can leave out: value, key and headers."""

# The publisher adds the installation's prefix.
_BARE = Names()


class OutcomeEncoder:
    """Encodes the outcomes of one stage. `source` names the stage in its events (`ce_source`)."""

    def __init__(self, stage: Stage, source: str) -> None:
        self._source = source
        self._dead = _BARE.dead(stage.name)
        self._delays = {seconds: _BARE.delay(stage.name, seconds) for seconds in stage.delays}

    def __call__(self, record: InFlightRecord, outcome: Outcome, leave_out: int = 0) -> list[OutgoingRecord]:
        """Return the records that must be acked before `record` is finished.

        `leave_out` says what a dead letter goes without: 0 nothing, 1 its value, ALL its key and headers too.
        Raise ValueError for a delay that the stage does not have, and TypeError or AttributeError for an
        outcome or an event that is none.
        """
        if isinstance(outcome, Done):
            return self._events(record, outcome)
        if isinstance(outcome, Retry):
            return [*self._events(record, outcome), self._delayed(record, outcome)]
        if isinstance(outcome, Dead):
            return [self._dead_letter(record, outcome, leave_out)]
        raise TypeError(f"a handler returned {type(outcome).__name__}, which is no outcome")

    def _events(self, record: InFlightRecord, outcome: Done | Retry) -> list[OutgoingRecord]:
        return [encode(event, self._source, record.traceparent) for event in outcome.events]

    def _delayed(self, record: InFlightRecord, outcome: Retry) -> OutgoingRecord:
        topic = self._delays.get(outcome.delay)
        if topic is None:
            raise ValueError(f"a handler asked for a delay of {outcome.delay} s, which its stage lacks")
        headers = delayed_headers(
            record.headers,
            origin=_origin(record),
            attempt=record.attempt + outcome.counts,
            cause=outcome.cause,
            due_at_ms=outcome.due_at_ms,
        )
        return OutgoingRecord(topic, record.key or b"", record.value or b"", headers)

    def _dead_letter(self, record: InFlightRecord, outcome: Dead, leave_out: int) -> OutgoingRecord:
        # A missing key or value stays missing, for the dead letter is the original record.
        value, key, kept = record.value, record.key, record.headers
        parts = []
        if leave_out and value is not None:
            parts.append(LeftOut.of("value", value))
            value = None
        if leave_out == ALL:
            # It names a missing key too: so a reader sees that the headers are left out.
            parts.append(LeftOut.of("key", key or b""))
            key = kept = None
        headers = dead_letter_headers(
            kept,
            origin=_origin(record),
            attempt=record.attempt,
            cause=outcome.cause,
            # A replay produces only events.
            foreign=record.event is None,
            left_out=parts,
        )
        return OutgoingRecord(self._dead, key, value, headers)  # type: ignore[arg-type]


def _origin(record: InFlightRecord) -> RecordLocation:
    return record.origin or RecordLocation(record.topic, record.assignment.partition, record.offset)
