"""Publishes again the outcomes that could not be published, until Kafka acks them.

An outcome that Kafka would refuse every time becomes a dead letter: none is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog
from confluent_kafka import KafkaError
from prometheus_client import Counter

from services.common.kafka.publisher import Publisher, is_permanent
from services.common.kafka.records import OutgoingRecord
from services.common.stage.in_flight_record import InFlightRecord
from services.common.stage.outcome_encoder import ALL
from services.common.stage.types import Dead, Outcome

__all__ = ["PendingOutcome", "Republisher"]

log = structlog.get_logger(__name__)

# Seconds between two rounds: they double from the first to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0


@dataclass(slots=True)
class PendingOutcome:
    """A record, its outcome, and the records to be published for it that are not all acked.

    `left_out` says how much its dead letter goes without (outcome_encoder.py).
    """

    record: InFlightRecord
    outcome: Outcome
    outgoing: list[OutgoingRecord]
    left_out: int = 0


class Republisher:
    """Publishes each pending outcome again, in rounds with growing pauses.

    Kafka refuses some records every time (too large). An outcome with such a record becomes a dead letter.
    Where Kafka refuses that too, it goes without its value, then without its key and headers. `encode` makes
    the records of the new outcome. In the end `on_published` or `on_abandoned` takes the record.
    """

    def __init__(
        self,
        publisher: Publisher,
        failures: Counter,
        encode: Callable[[InFlightRecord, Outcome, int], list[OutgoingRecord]],
        on_published: Callable[[list[PendingOutcome]], None],
        on_abandoned: Callable[[list[InFlightRecord]], None],
    ) -> None:
        self._publisher, self._failures, self._encode = publisher, failures, encode
        self._on_published, self._on_abandoned = on_published, on_abandoned
        self._pending: dict[InFlightRecord, PendingOutcome] = {}
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Return how many outcomes are pending."""
        return len(self._pending)

    def add(self, pending: PendingOutcome, error: KafkaError) -> None:
        """Take an outcome whose publishing failed with `error`. Does not block."""
        self._pending[pending.record] = pending
        self._on_failure(pending, error)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def abandon(self, matches: Callable[[InFlightRecord], bool]) -> None:
        """Stop publishing for records that match: they stay unfinished, for their partition's next owner."""
        gone = [record for record in self._pending if matches(record)]
        for record in gone:
            del self._pending[record]
        self._on_abandoned(gone)

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while self._pending:
            log.warning("outcomes are published again", records=len(self._pending), seconds=pause)
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, 2 * pause)
            self.abandon(lambda record: not record.assignment.live)
            await self._publish_all(list(self._pending.values()))

    async def _publish_all(self, round_: Collection[PendingOutcome]) -> None:
        results = await asyncio.gather(*(self._publisher.publish(pending.outgoing) for pending in round_))
        published = []
        for pending, failures in zip(round_, results, strict=True):
            if pending.record not in self._pending:
                continue
            if failures:
                self._on_failure(pending, failures[0][1])
            else:
                del self._pending[pending.record]
                published.append(pending)
        self._on_published(published)

    def _on_failure(self, pending: PendingOutcome, error: KafkaError) -> None:
        self._failures.inc()
        if not is_permanent(error):
            return
        if not isinstance(pending.outcome, Dead):
            pending.outcome = Dead(f"its outcome cannot be published: {error}")
        elif pending.left_out < ALL:
            pending.left_out += 1
            log.error(
                "a dead letter is too large and goes without a part",
                topic=pending.record.topic,
                partition=pending.record.assignment.partition,
                offset=pending.record.offset,
                error=str(error),
            )
        pending.outgoing = self._encode(pending.record, pending.outcome, pending.left_out)
