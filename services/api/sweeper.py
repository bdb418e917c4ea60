"""The slow path out: what a crash or an outage left in the outbox is published from there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog
from sqlalchemy import Connection, Engine

from postroad.v1 import events_pb2
from services.api import outbox
from services.api.outbox import Item
from services.api.relay import Relay
from services.api.trace import traceparent
from services.common import taskstore
from services.common.database import transaction, transient
from services.common.events import encode
from services.common.stage.publisher import Publisher
from services.common.telemetry import API_PUBLISHED, STAGE_PUBLISH_FAILURES

__all__ = ["Sweeper", "rebuilt"]

log = structlog.get_logger(__name__)

_EVERY = 1.0
_AFTER_FAILURE = 2


class Sweeper:
    """Takes what is due, publishes it, and removes what was acked; any number of replicas may sweep at once.

    `most` items are in hand at a time; their bodies are in memory.
    """

    def __init__(self, engine: Engine, publisher: Publisher, relay: Relay, most: int) -> None:
        self._engine, self._publisher, self._relay, self._most = engine, publisher, relay, most
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Let the run end after what is in hand."""
        self._stopping.set()

    async def run(self) -> None:
        """Sweep until stopped. While the database or Kafka is away it goes on trying."""
        while not self._stopping.is_set():
            if self._publisher.fatal is not None:
                raise RuntimeError(f"the producer cannot go on: {self._publisher.fatal}")
            try:
                more = await self._sweep()
            except Exception as error:
                if not transient(error):
                    log.exception("a sweep failed")
                more = False
            if not more:
                await self._pause(_EVERY)

    async def _sweep(self) -> bool:
        """Return whether there may be more to do at once."""
        taken = await asyncio.to_thread(transaction, self._engine, self._take)
        items = [item for item in taken if not self._relay.holds(item.task_id)]
        if not items:
            return False
        events = await asyncio.to_thread(transaction, self._engine, lambda c: rebuilt(c, items))
        there = [item for item in items if item in events]
        if len(there) < len(items):
            log.error("in the outbox without a task", ids=[i.task_id.hex() for i in items if i not in events])
        records = [encode(events[item], "api", traceparent(None, item.task_id)) for item in there]
        failures = await self._publisher.attempt(records)
        failed = {index for index, _ in failures}
        acked = [item for index, item in enumerate(there) if index not in failed]
        left = [item for index, item in enumerate(there) if index in failed]

        def settle(connection: Connection) -> None:
            outbox.delete(connection, acked)
            outbox.defer(connection, left, _AFTER_FAILURE)

        API_PUBLISHED.labels("sweeper").inc(len(acked))
        if failed:
            STAGE_PUBLISH_FAILURES.labels("api").inc(len(failed))
        await asyncio.to_thread(transaction, self._engine, settle)
        log.info("swept", published=len(acked), failed=len(left))
        return len(taken) == self._most and not left

    def _take(self, connection: Connection) -> list[Item]:
        return outbox.take(connection, self._most)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass


def rebuilt(connection: Connection, items: Sequence[Item]) -> dict[Item, events_pb2.TaskCreated]:
    """Return the event of each item whose task is there, the same that the relay would have published."""
    tasks = taskstore.load_tasks(connection, [item.task_id for item in items])
    return {
        item: events_pb2.TaskCreated(task=task, epoch=item.epoch, at_us=task.created_at_us)
        for item in items
        if (task := tasks.get(item.task_id)) is not None
    }
