"""The slow path out: what was scheduled is published when its time comes, and what a crash or an outage left
in the outbox is published from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from postroad.v1 import events_pb2 as pb
from services.api import outbox
from services.api.metrics import API_PUBLISHED
from services.api.outbox import CANCELLED, CREATED, OUTCOME, Decided, Item
from services.api.relay import Relay
from services.api.trace import traceparent
from services.common import taskstore
from services.common.database.errors import is_transient
from services.common.database.times import to_micros
from services.common.database.transactions import transaction
from services.common.events import encode, event_key
from services.common.kafka.publisher import Publisher
from services.common.kafka.topics import MAIL_FAILED, MAIL_SENT
from services.common.stage.metrics import STAGE_PUBLISH_FAILURES

__all__ = ["Sweeper", "chunks", "rebuilt"]

log = structlog.get_logger(__name__)

R = TypeVar("R")

_EVERY = 0.5
"""Seconds between two looks at most: another replica may have scheduled something meanwhile."""
_AT_LEAST = 0.01
_AFTER_FAILURE = 2
_CHUNK = 4 << 20
"""Bytes of bodies that are in hand at a time; one that is larger is alone."""


class Sweeper:
    """Takes what is due, publishes it, and removes what was acked; any number of replicas may sweep at once.

    It takes up to `most` items at a time, and wakes when the next one is due by the database's clock.
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
                wait = await self._sweep()
            except Exception as error:
                if not is_transient(error):
                    log.exception("a sweep failed")
                wait = _EVERY
            if wait > 0:
                await self._pause(wait)

    async def _sweep(self) -> float:
        """Return the seconds until there may be more to do."""
        taken, wait = await self._transact(self._take)
        due = self._now() + wait
        items = [item for item in taken if not self._relay.holds(item)]
        if items:
            left = await self._empty(items)
            log.info("swept", published=len(items) - len(left), left=len(left))
            if left:
                return _EVERY
        return max(0.0, due - self._now())

    def _take(self, connection: Connection) -> tuple[list[Item], float]:
        taken = outbox.take(connection, self._most)
        if len(taken) == self._most:
            return taken, 0.0
        return taken, max(_AT_LEAST, outbox.next_due(connection, _EVERY))

    async def _empty(self, items: list[Item]) -> list[Item]:
        """Publish the items and remove them; return those that were not acked, due again a little later."""
        left = items
        try:
            for chunk in await self._transact(lambda connection: chunks(connection, items)):
                acked = await self._publish(chunk)
                await self._transact(partial(outbox.delete, items=acked))
                left = sorted(set(left).difference(acked))
                if len(acked) < len(chunk):
                    break
        except Exception:
            # Their lease would keep them for longer than the trouble may last.
            with suppress(SQLAlchemyError):
                await self._transact(lambda connection: outbox.defer(connection, left, _AFTER_FAILURE))
            raise
        if left:
            await self._transact(lambda connection: outbox.defer(connection, left, _AFTER_FAILURE))
        return left

    async def _publish(self, items: Sequence[Item]) -> list[Item]:
        """Return the items that were acked."""
        events = await self._transact(lambda connection: rebuilt(connection, items))
        there = [item for item in items if item in events]
        if len(there) < len(items):
            log.error("in the outbox without a task", ids=[i.task_id.hex() for i in items if i not in events])
        records = [encode(events[item], "api", traceparent(None, item.task_id)) for item in there]
        failed = {index for index, _ in await self._publisher.publish(records)}
        API_PUBLISHED.labels("sweeper").inc(len(there) - len(failed))
        if failed:
            STAGE_PUBLISH_FAILURES.labels("api").inc(len(failed))
        return [item for index, item in enumerate(there) if index not in failed]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _transact(self, work: Callable[[Connection], R]) -> R:
        return await asyncio.to_thread(transaction, self._engine, work)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass


def chunks(connection: Connection, items: Sequence[Item]) -> list[list[Item]]:
    """Return the items in parts whose bodies are in memory together."""
    sizes = taskstore.sizes_of_bodies(connection, [item.task_id for item in items if item.kind == CREATED])
    parts: list[list[Item]] = []
    room = 0
    for item in items:
        size = sizes.get(item.task_id, 0) if item.kind == CREATED else 0
        if not parts or size > room:
            parts.append([])
            room = _CHUNK
        parts[-1].append(item)
        room -= size
    return parts


def rebuilt(connection: Connection, items: Sequence[Item]) -> Mapping[Item, Decided]:
    """Return the event of each item whose task is there, the same that the relay would have published.

    Blocks. The bodies of all tasks are in memory.
    """
    ids = sorted({item.task_id for item in items if item.kind == CREATED})
    tasks = taskstore.load_tasks(connection, ids)
    send_times = taskstore.send_times(connection, ids)
    cancellations = {
        (item.task_id, event_key(event)): (item, event)
        for item in items
        if item.kind == CANCELLED
        for event in (pb.TaskCancelled(id=item.task_id, epoch=item.epoch),)
    }
    lines = taskstore.load_events(connection, list(cancellations))
    events: dict[Item, Decided] = {}
    for item in items:
        if item.kind == CREATED and (task := tasks.get(item.task_id)) is not None:
            at_us = item.epoch * 1000 or task.created_at_us
            send_at_us = outbox.send_at(item.epoch, send_times.get(item.task_id, 0))
            events[item] = pb.TaskCreated(task=task, epoch=item.epoch, at_us=at_us, send_at_us=send_at_us)
    for key, (item, event) in cancellations.items():
        if (line := lines.get(key)) is not None:
            event.at_us, event.attempts = to_micros(line.at), line.attempt
            event.in_doubt = bool(line.detail)
            events[item] = event
    for item in items:
        if item.kind == OUTCOME and (event_ := _outcome(connection, item)) is not None:
            events[item] = event_
    return events


def _outcome(connection: Connection, item: Item) -> pb.MailSent | pb.MailFailed | None:
    """Return the event in which the item's epoch ended, as `outcome.event_of` made it."""
    lines = taskstore.load_epoch(connection, item.task_id, (MAIL_SENT, MAIL_FAILED), item.epoch)
    if not lines:
        return None
    line = lines[0]
    if line.kind == "sent":
        event: pb.MailSent | pb.MailFailed = pb.MailSent(message_id=line.detail, resolved=line.stage == "api")
    else:
        reason, _, message_id = line.detail.partition(": ")
        event = pb.MailFailed(reason=reason, message_id=message_id, uncertain=line.kind == "in_doubt")
    event.id, event.epoch, event.attempt = item.task_id, item.epoch, line.attempt
    event.relay, event.reply, event.at_us = line.relay, line.reply, to_micros(line.at)
    return event
