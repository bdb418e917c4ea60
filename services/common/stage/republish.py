"""Publishing again what could not be published, until it is: nothing is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog
from confluent_kafka import KafkaError
from prometheus_client import Counter

from services.common.kafka.publisher import Publisher, hopeless
from services.common.kafka.records import OutgoingRecord
from services.common.stage.ledger import Fetched
from services.common.stage.outgoing import ALL
from services.common.stage.types import Dead, Outcome

__all__ = ["Pending", "Republisher"]

log = structlog.get_logger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0


@dataclass(slots=True)
class Pending:
    """A record whose outcome stands and whose outgoing records are not all acked.

    `left_out` is how much its dead letter goes without (outgoing.py).
    """

    record: Fetched
    outcome: Outcome
    outgoing: list[OutgoingRecord]
    left_out: int = 0


class Republisher:
    """Tries again, each record by itself and with growing pauses, what the publisher gave up.

    `render` makes the outgoing records of another outcome: where events are refused for ever (too large),
    the record becomes a dead letter. Where that one is too, it goes without its value, then without its key
    and headers. `finished` and `abandoned` take records in the end.
    """

    def __init__(
        self,
        publisher: Publisher,
        failures: Counter,
        render: Callable[[Fetched, Outcome, int], list[OutgoingRecord]],
        finished: Callable[[list[Pending]], None],
        abandoned: Callable[[list[Fetched]], None],
    ) -> None:
        self._publisher, self._failures, self._render = publisher, failures, render
        self._finished, self._abandoned = finished, abandoned
        self._pending: dict[Fetched, Pending] = {}
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Return how many records wait."""
        return len(self._pending)

    def add(self, pending: Pending, error: KafkaError) -> None:
        """Take a record whose publishing failed with `error`."""
        self._pending[pending.record] = pending
        self._failed(pending, error)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._insist())

    def abandon(self, meant: Callable[[Fetched], bool]) -> None:
        """Give up on these records: they stay unfinished, for their partition's next owner."""
        gone = [record for record in self._pending if meant(record)]
        for record in gone:
            del self._pending[record]
        self._abandoned(gone)

    async def _insist(self) -> None:
        pause = _FIRST_PAUSE
        while self._pending:
            log.warning("not published, trying again", records=len(self._pending), seconds=pause)
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, 2 * pause)
            self.abandon(lambda record: not record.assignment.live)
            await self._round(list(self._pending.values()))

    async def _round(self, round_: Collection[Pending]) -> None:
        answers = await asyncio.gather(*(self._publisher.attempt(pending.outgoing) for pending in round_))
        finished = []
        for pending, failures in zip(round_, answers, strict=True):
            if pending.record not in self._pending:
                continue
            if failures:
                self._failed(pending, failures[0][1])
            else:
                del self._pending[pending.record]
                finished.append(pending)
        self._finished(finished)

    def _failed(self, pending: Pending, error: KafkaError) -> None:
        self._failures.inc()
        if not hopeless(error):
            return
        if not isinstance(pending.outcome, Dead):
            pending.outcome = Dead(f"what it gave rise to cannot be published: {error}")
        elif pending.left_out < ALL:
            pending.left_out += 1
            log.error(
                "a dead letter does not fit, it goes without a part",
                topic=pending.record.topic,
                partition=pending.record.assignment.partition,
                offset=pending.record.offset,
                error=str(error),
            )
        pending.outgoing = self._render(pending.record, pending.outcome, pending.left_out)
