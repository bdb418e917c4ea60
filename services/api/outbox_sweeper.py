"""The sweeper: publishes scheduled events when they are due, and what a crash or an outage left behind."""

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
from services.api.outbox import CANCELLED, CREATED, OUTCOME, ApiEvent, OutboxRow
from services.api.outbox_publisher import OutboxPublisher
from services.api.trace import request_traceparent
from services.common import taskstore
from services.common.database.errors import is_transient
from services.common.database.times import to_micros
from services.common.database.transactions import transaction
from services.common.events import encode, event_key
from services.common.kafka.publisher import Publisher
from services.common.kafka.topics import MAIL_FAILED, MAIL_SENT
from services.common.stage.metrics import STAGE_PUBLISH_FAILURES

__all__ = ["Sweeper", "events_of_rows", "split_by_size"]

log = structlog.get_logger(__name__)

R = TypeVar("R")

_MAX_PAUSE = 0.5
"""Seconds between two looks at the outbox. Another replica may have added a row meanwhile."""
_MIN_PAUSE = 0.01
_FAILURE_DELAY = 2
_MAX_PART_BYTES = 4 << 20
"""Bytes of bodies in memory at a time. A larger single body is loaded alone."""


class Sweeper:
    """Takes due rows of the outbox, publishes their events, and deletes the rows that Kafka acknowledged.

    Any number of replicas may sweep at once. Each takes up to `max_rows` at a time, and wakes when the next
    row is due by the database's clock.
    """

    def __init__(
        self, engine: Engine, publisher: Publisher, outbox_publisher: OutboxPublisher, max_rows: int
    ) -> None:
        self._engine, self._publisher, self._outbox_publisher = engine, publisher, outbox_publisher
        self._max_rows = max_rows
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Let `run` return after its present sweep."""
        self._stopping.set()

    async def run(self) -> None:
        """Sweep until stopped. Keeps trying while the database or Kafka is away."""
        while not self._stopping.is_set():
            try:
                pause = await self._sweep()
            except Exception as error:
                if not is_transient(error):
                    log.exception("a sweep failed")
                pause = _MAX_PAUSE
            if pause > 0:
                await self._pause(pause)

    async def _sweep(self) -> float:
        """Sweep once; return the seconds until the next sweep."""
        taken, pause = await self._transact(self._take)
        next_sweep = self._now() + pause
        rows = [row for row in taken if not self._outbox_publisher.is_publishing(row)]
        if rows:
            left = await self._publish_and_delete(rows)
            log.info("swept", published=len(rows) - len(left), left=len(left))
            if left:
                return _MAX_PAUSE
        return max(0.0, next_sweep - self._now())

    def _take(self, connection: Connection) -> tuple[list[OutboxRow], float]:
        """Return the taken rows, and the seconds until more are due."""
        taken = outbox.take(connection, self._max_rows)
        if len(taken) == self._max_rows:
            return taken, 0.0
        return taken, max(_MIN_PAUSE, outbox.next_due(connection, _MAX_PAUSE))

    async def _publish_and_delete(self, rows: list[OutboxRow]) -> list[OutboxRow]:
        """Return the rows whose events were not acknowledged. They are due again 2 s later."""
        left = rows
        try:
            for part in await self._transact(lambda connection: split_by_size(connection, rows)):
                acked = await self._publish(part)
                await self._transact(partial(outbox.delete, rows=acked))
                left = sorted(set(left).difference(acked))
                if len(acked) < len(part):
                    break
        except Exception:
            # Otherwise the lease would keep these rows back for longer than the outage may last.
            with suppress(SQLAlchemyError):
                await self._transact(lambda connection: outbox.defer(connection, left, _FAILURE_DELAY))
            raise
        if left:
            await self._transact(lambda connection: outbox.defer(connection, left, _FAILURE_DELAY))
        return left

    async def _publish(self, rows: Sequence[OutboxRow]) -> list[OutboxRow]:
        """Publish the events of these rows; return the rows that Kafka acknowledged."""
        events = await self._transact(lambda connection: events_of_rows(connection, rows))
        found = [row for row in rows if row in events]
        if len(found) < len(rows):
            log.error("in the outbox without a task", ids=[r.task_id.hex() for r in rows if r not in events])
        records = [encode(events[row], "api", request_traceparent(None, row.task_id)) for row in found]
        failed = {index for index, _ in await self._publisher.publish(records)}
        API_PUBLISHED.labels("sweeper").inc(len(found) - len(failed))
        if failed:
            STAGE_PUBLISH_FAILURES.labels("api").inc(len(failed))
        return [row for index, row in enumerate(found) if index not in failed]

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


def split_by_size(connection: Connection, rows: Sequence[OutboxRow]) -> list[list[OutboxRow]]:
    """Split rows into parts whose bodies have at most 4 MiB in all. Blocks."""
    sizes = taskstore.sizes_of_bodies(connection, [row.task_id for row in rows if row.kind == CREATED])
    parts: list[list[OutboxRow]] = []
    left = 0
    for row in rows:
        size = sizes.get(row.task_id, 0) if row.kind == CREATED else 0
        if not parts or size > left:
            parts.append([])
            left = _MAX_PART_BYTES
        parts[-1].append(row)
        left -= size
    return parts


def events_of_rows(connection: Connection, rows: Sequence[OutboxRow]) -> Mapping[OutboxRow, ApiEvent]:
    """Return the event of each row whose task exists, equal to the one that the outbox publisher publishes.

    Blocks, and holds the bodies of all these tasks in memory.
    """
    ids = sorted({row.task_id for row in rows if row.kind == CREATED})
    tasks = taskstore.load_tasks(connection, ids)
    send_times = taskstore.send_times(connection, ids)
    cancellations = {
        (row.task_id, event_key(event)): (row, event)
        for row in rows
        if row.kind == CANCELLED
        for event in (pb.TaskCancelled(id=row.task_id, epoch=row.epoch),)
    }
    entries = taskstore.load_events(connection, list(cancellations))
    events: dict[OutboxRow, ApiEvent] = {}
    for row in rows:
        if row.kind == CREATED and (task := tasks.get(row.task_id)) is not None:
            at_us = row.epoch * 1000 or task.created_at_us
            send_at_us = outbox.send_at(row.epoch, send_times.get(row.task_id, 0))
            events[row] = pb.TaskCreated(task=task, epoch=row.epoch, at_us=at_us, send_at_us=send_at_us)
    for key, (row, event) in cancellations.items():
        if (entry := entries.get(key)) is not None:
            event.at_us, event.attempts = to_micros(entry.at), entry.attempt
            event.in_doubt = bool(entry.detail)
            events[row] = event
    for row in rows:
        if row.kind == OUTCOME and (outcome := _load_outcome(connection, row)) is not None:
            events[row] = outcome
    return events


def _load_outcome(connection: Connection, row: OutboxRow) -> pb.MailSent | pb.MailFailed | None:
    """Return the event that ended the row's epoch, as `row_events.event_of` built it."""
    entries = taskstore.load_epoch(connection, row.task_id, (MAIL_SENT, MAIL_FAILED), row.epoch)
    if not entries:
        return None
    entry = entries[0]
    if entry.kind == "sent":
        event: pb.MailSent | pb.MailFailed = pb.MailSent(
            message_id=entry.detail, resolved=entry.stage == "api"
        )
    else:
        reason, _, message_id = entry.detail.partition(": ")
        event = pb.MailFailed(reason=reason, message_id=message_id, uncertain=entry.kind == "in_doubt")
    event.id, event.epoch, event.attempt = row.task_id, row.epoch, entry.attempt
    event.relay, event.reply, event.at_us = entry.relay, entry.reply, to_micros(entry.at)
    return event
