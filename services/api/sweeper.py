"""The slow path out: what a crash or an outage left in the outbox is published from there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from postroad.v1 import events_pb2 as pb
from services.api import outbox
from services.api.outbox import CANCELLED, CREATED, Item
from services.api.relay import Relay
from services.api.trace import traceparent
from services.common import taskstore
from services.common.database import transaction, transient
from services.common.events import encode, event_key
from services.common.schema import to_micros
from services.common.stage.publisher import Publisher
from services.common.telemetry import API_PUBLISHED, STAGE_PUBLISH_FAILURES

__all__ = ["Sweeper", "rebuilt"]

log = structlog.get_logger(__name__)

R = TypeVar("R")

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
        taken = await self._transact(lambda connection: outbox.take(connection, self._most))
        items = [item for item in taken if not self._relay.holds(item)]
        if not items:
            return False
        try:
            acked = await self._publish(items)
            await self._transact(lambda connection: outbox.delete(connection, acked))
        except Exception:
            # Their lease would keep them for longer than the trouble may last.
            with suppress(SQLAlchemyError):
                await self._transact(lambda connection: outbox.defer(connection, items, _AFTER_FAILURE))
            raise
        left = sorted(set(items).difference(acked))
        if left:
            await self._transact(lambda connection: outbox.defer(connection, left, _AFTER_FAILURE))
        log.info("swept", published=len(acked), left=len(left))
        return len(taken) == self._most and not left

    async def _publish(self, items: Sequence[Item]) -> list[Item]:
        """Return the items that were acked."""
        events = await self._transact(lambda connection: rebuilt(connection, items))
        there = [item for item in items if item in events]
        if len(there) < len(items):
            log.error("in the outbox without a task", ids=[i.task_id.hex() for i in items if i not in events])
        records = [encode(events[item], "api", traceparent(None, item.task_id)) for item in there]
        failed = {index for index, _ in await self._publisher.attempt(records)}
        API_PUBLISHED.labels("sweeper").inc(len(there) - len(failed))
        if failed:
            STAGE_PUBLISH_FAILURES.labels("api").inc(len(failed))
        return [item for index, item in enumerate(there) if index not in failed]

    async def _transact(self, work: Callable[[Connection], R]) -> R:
        return await asyncio.to_thread(transaction, self._engine, work)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass


def rebuilt(
    connection: Connection, items: Sequence[Item]
) -> Mapping[Item, pb.TaskCreated | pb.TaskCancelled]:
    """Return the event of each item whose task is there, the same that the relay would have published.

    Blocks. The bodies of all tasks are in memory.
    """
    ids = sorted({item.task_id for item in items if item.kind == CREATED})
    tasks = taskstore.load_tasks(connection, ids)
    cancellations = {
        (item.task_id, event_key(event)): (item, event)
        for item in items
        if item.kind == CANCELLED
        for event in (pb.TaskCancelled(id=item.task_id, epoch=item.epoch),)
    }
    lines = taskstore.load_events(connection, list(cancellations))
    events: dict[Item, pb.TaskCreated | pb.TaskCancelled] = {}
    for item in items:
        if item.kind == CREATED and (task := tasks.get(item.task_id)) is not None:
            at_us = item.epoch * 1000 or task.created_at_us
            events[item] = pb.TaskCreated(task=task, epoch=item.epoch, at_us=at_us)
    for key, (item, event) in cancellations.items():
        if (line := lines.get(key)) is not None:
            event.at_us, event.attempts = to_micros(line.at), line.attempt
            events[item] = event
    return events
