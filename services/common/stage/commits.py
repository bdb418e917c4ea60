"""Committing positions. Used on the poller's thread alone."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import confluent_kafka
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException

from services.common.stage import metrics
from services.common.stage.ledger import Assignment, Ledger

__all__ = ["Commits"]

log = structlog.get_logger(__name__)

_EVERY = 0.5
_PAUSE = 0.2
_TRIES = 3


class Commits:
    """Commits a ledger's positions: now and then without waiting, and at once where partitions leave.

    One asynchronous commit is under way at a time, so that an old one which is sent again can never
    overtake a newer. One that fails is made up for by the next: what counts as committed is what was acked.
    """

    def __init__(self, ledger: Ledger, stage: str) -> None:
        self._ledger, self._stage = ledger, stage
        self._under_way: Mapping[Assignment, int] | None = None
        self._next = 0.0
        self.acked_at = 0.0
        """When the coordinator last acked a commit, monotonic seconds."""
        self._failures = metrics.STAGE_COMMIT_FAILURES.labels(stage)

    def use(self, consumer: Consumer) -> None:
        """Commit through this Consumer from now on."""
        self._consumer = consumer
        self._under_way = None

    def commit_if_due(self, now: float) -> None:
        """Start a commit of all that moved, if it is time (`now`: monotonic seconds)."""
        if now < self._next or self._under_way is not None:
            return
        self._next = now + _EVERY
        positions = self._ledger.to_commit()
        if not positions:
            return
        try:
            self._consumer.commit(offsets=_partitions(positions), asynchronous=True)
            self._under_way = positions
        except KafkaException as error:
            self._failed(error.args[0])

    def answered(self, error: KafkaError | None, partitions: list[confluent_kafka.TopicPartition]) -> None:
        """Take the answer to the asynchronous commit; librdkafka calls this inside poll."""
        positions, self._under_way = self._under_way or {}, None
        error = error or next((p.error for p in partitions if p.error is not None), None)
        if error is None:
            self._acked(positions)
        else:
            self._failed(error)

    def commit_now(self, assignments: Collection[Assignment], deadline: float) -> None:
        """Commit these and wait for the answer; again on failure, up to three times or the deadline."""
        for attempt in range(_TRIES):
            positions = self._ledger.to_commit(assignments)
            if not positions:
                return
            try:
                answers = self._consumer.commit(offsets=_partitions(positions), asynchronous=False)
                failed = next((p.error for p in answers if p.error is not None), None)
            except KafkaException as error:
                failed = error.args[0]
            if failed is None:
                self._acked(positions)
                return
            self._failed(failed)
            if attempt and time.monotonic() >= deadline:
                return
            time.sleep(_PAUSE)

    def _acked(self, positions: Mapping[Assignment, int]) -> None:
        self.acked_at = time.monotonic()
        self._ledger.committed(positions)

    def _failed(self, error: KafkaError) -> None:
        self._failures.inc()
        log.warning("commit failed", stage=self._stage, error=str(error))


def _partitions(positions: Mapping[Assignment, int]) -> list[confluent_kafka.TopicPartition]:
    return [confluent_kafka.TopicPartition(a.topic, a.partition, offset) for a, offset in positions.items()]
