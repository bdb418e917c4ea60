"""From a record and its outcome to what is to be produced. Pure."""

from __future__ import annotations

from services.common.events import encode
from services.common.kafka import headers
from services.common.kafka.headers import LeftOut
from services.common.kafka.records import OutgoingRecord
from services.common.kafka.topic_partition import RecordLocation
from services.common.kafka.topics import Names
from services.common.stage.ledger import Fetched
from services.common.stage.types import Dead, Done, Outcome, Retry, Stage

__all__ = ["ALL", "Render"]

ALL = 2
"""All that can be left out of a dead letter."""

# The publisher adds the installation's prefix.
_BARE = Names()


class Render:
    """Makes a stage's outgoing records. `source` is who speaks in its events (`ce_source`)."""

    def __init__(self, stage: Stage, source: str) -> None:
        self._source = source
        self._dead = _BARE.dead(stage.name)
        self._delays = {seconds: _BARE.delay(stage.name, seconds) for seconds in stage.delays}

    def __call__(self, record: Fetched, outcome: Outcome, leave_out: int = 0) -> list[OutgoingRecord]:
        """Return all that must be acked before `record` is finished.

        `leave_out`: what a dead letter goes without: 0 nothing, 1 its value, ALL its key and headers too.
        Raises what is the handler's fault: ValueError for a delay that the stage does not have, TypeError
        or AttributeError for what is no outcome or no event.
        """
        if isinstance(outcome, Done):
            return self._events(record, outcome)
        if isinstance(outcome, Retry):
            return [*self._events(record, outcome), self._delayed(record, outcome)]
        if isinstance(outcome, Dead):
            return [self._letter(record, outcome, leave_out)]
        raise TypeError(f"a handler answered {type(outcome).__name__}, no outcome")

    def _events(self, record: Fetched, outcome: Done | Retry) -> list[OutgoingRecord]:
        return [encode(event, self._source, record.traceparent) for event in outcome.events]

    def _delayed(self, record: Fetched, outcome: Retry) -> OutgoingRecord:
        topic = self._delays.get(outcome.delay)
        if topic is None:
            raise ValueError(f"a handler asked for a delay of {outcome.delay} s, which the stage has not")
        carried = headers.delayed_headers(
            record.headers,
            origin=_origin(record),
            attempt=record.attempt + outcome.counts,
            cause=outcome.cause,
            due_at_ms=outcome.due_at_ms,
        )
        return OutgoingRecord(topic, record.key or b"", record.value or b"", carried)

    def _letter(self, record: Fetched, outcome: Dead, leave_out: int) -> OutgoingRecord:
        # A key or value that is not there stays so: the letter is the original record.
        value, key, kept = record.value, record.key, record.headers
        gone = []
        if leave_out and value is not None:
            gone.append(LeftOut.of("value", value))
            value = None
        if leave_out == ALL:
            # An absent key is told too: the letter has then lost its headers.
            gone.append(LeftOut.of("key", key or b""))
            key = kept = None
        carried = headers.dead_letter_headers(
            kept,
            origin=_origin(record),
            attempt=record.attempt,
            cause=outcome.cause,
            # A replay produces events alone.
            foreign=record.event is None,
            left_out=gone,
        )
        return OutgoingRecord(self._dead, key, value, carried)  # type: ignore[arg-type]


def _origin(record: Fetched) -> RecordLocation:
    return record.origin or RecordLocation(record.topic, record.assignment.partition, record.offset)
