"""The stage's Publisher without librdkafka: records arrive in order while their process lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from confluent_kafka import KafkaError

from services.common.kafka import publisher
from services.common.kafka.publisher import PublishFailure
from services.common.kafka.records import OutgoingRecord
from tests.simulation.broker import Broker
from tests.simulation.loop import Loop
from tests.simulation.scheduler import here

__all__ = ["Publisher"]

_TIMEOUT = 30.0


class Publisher(publisher.Publisher):
    """Replaces services.common.kafka.publisher.Publisher."""

    broker: Broker
    """The broker of the present schedule."""

    def __init__(self, settings: Any, client_id: str = "", **overrides: Any) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        self._loop, self._process = loop, loop.process
        self._scheduler = here()
        self._last = 0.0
        self._open = 0

    def start(self) -> None:
        """Do nothing."""

    def send(self, batch: Sequence[OutgoingRecord], done: Callable[[list[PublishFailure]], None]) -> None:
        """Publish a batch. Calls `done` once, with the failures."""
        if not batch:
            self._loop.call_soon(done, [])
            return
        failures: list[PublishFailure] = []
        left = len(batch)
        self._open += 1

        def acked(index: int, error: KafkaError | None) -> None:
            nonlocal left
            left -= 1
            if error is not None:
                failures.append((index, error))
            if not left:
                self._open -= 1
                self._loop.enter(done, failures)

        for index, item in enumerate(batch):
            now = self._scheduler.now
            # In order, with a latency each: the process may die between any two.
            self._last = max(self._last, now + self._scheduler.latency(0.003)) + 1e-6
            self._scheduler.after(self._last - now, self._process, self._leave, item, index, acked, now)

    async def close(self, seconds: float) -> bool:
        """Wait until all batches are acked, for `seconds` at most. Return whether they are."""
        until = self._scheduler.now + seconds
        while self._open and self._scheduler.now < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return not self._open

    def _leave(self, item: OutgoingRecord, index: int, acked: Any, since: float) -> None:
        """Put a record into the socket: it arrives even if the process dies."""
        self._scheduler.after(self._scheduler.latency(0.001), None, self._arrive, item, index, acked, since)

    def _arrive(self, item: OutgoingRecord, index: int, acked: Any, since: float) -> None:
        world, scheduler = self.broker.world, self._scheduler
        if not world.up("kafka"):
            left = since + _TIMEOUT - world.now
            if left <= 0:
                error = KafkaError(KafkaError._MSG_TIMED_OUT)
                scheduler.after(scheduler.latency(), self._process, acked, index, error)
                return
            wait = min(left, world.away["kafka"] - world.now) + 1e-6
            self._last = max(self._last, world.now + wait)
            # The producer still holds the record, which is lost if the process dies.
            scheduler.after(wait, self._process, self._arrive, item, index, acked, since)
            return
        failed: KafkaError | None = None
        verdict = world.operation("dead" if item.topic.endswith(".dead") else "produce", self._process)
        if verdict:
            failed = KafkaError(KafkaError._MSG_TIMED_OUT)
        if verdict != "refused":
            self.broker.append(item.topic, item.key, item.value, item.headers)
        scheduler.after(scheduler.latency(), self._process, acked, index, failed)
