"""The outbox publisher: publishes events as soon as their transaction is committed.

It guarantees nothing. An event that it refuses, fails to publish or leaves behind in a crash stays in the
outbox, and a sweeper publishes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import structlog

from services.api.metrics import API_PUBLISHED, OUTBOX_HELD
from services.api.outbox import ApiEvent, OutboxEvent, OutboxRow, row_of
from services.common.batching import Batcher
from services.common.database.errors import error_text
from services.common.events import encode
from services.common.kafka.publisher import Publisher, PublishFailure
from services.common.kafka.records import OutgoingRecord
from services.common.stage.metrics import STAGE_PUBLISH_FAILURES

__all__ = ["OutboxPublisher"]

log = structlog.get_logger(__name__)

_DELETE_INTERVAL = 0.5
"""Seconds between two deletions from the outbox. Nobody waits for them, and larger ones cost little more.
After a crash a sweeper publishes what was acked in this time again, and stages recognise it."""
_DELETE_COUNT = 1000
"""Acked events whose rows are deleted at once."""


class OutboxPublisher:
    """Publishes committed events, then deletes their outbox rows. Belongs to one event loop.

    At most `max_count` events and `max_bytes` bytes wait for their acks. The sweeper gets further ones, as
    while Kafka is away. `deleter` deletes the rows of acknowledged events.
    """

    def __init__(
        self, publisher: Publisher, deleter: Batcher[OutboxRow, None], max_count: int, max_bytes: int
    ) -> None:
        self._publisher, self._deleter = publisher, deleter
        self._max_count, self._max_bytes = max_count, max_bytes
        self._held: set[OutboxRow] = set()
        OUTBOX_HELD.set_function(lambda: len(self._held))
        self._has_capacity = True
        self._acked: list[OutboxRow] = []
        self._count = self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._published = API_PUBLISHED.labels("relay")
        self._deleting: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def is_publishing(self, row: OutboxRow) -> bool:
        """Return whether this row's event is being published, or its row deleted, right now."""
        return row in self._held

    def publish(self, committed: Sequence[OutboxEvent[ApiEvent]]) -> None:
        """Begin to publish the events of one transaction, as many as the limits allow. Never blocks."""
        batch: list[OutgoingRecord] = []
        rows: list[OutboxRow] = []
        size = 0
        for outbox_event in committed:
            if self._count + len(rows) >= self._max_count or self._bytes + size >= self._max_bytes:
                break
            record = encode(outbox_event.event, "api", outbox_event.traceparent)
            batch.append(record)
            rows.append(row_of(outbox_event.event))
            size += len(record.value)
        self._log_capacity(len(batch) == len(committed))
        if batch:
            self._held.update(rows)
            self._count += len(rows)
            self._bytes += size
            self._idle.clear()
            self._publisher.send(batch, partial(self._delivered, rows, size))

    async def drain(self, seconds: float) -> None:
        """Wait until all held events are published and deleted from the outbox, at most `seconds`."""
        self._draining = True
        self._start_deletion()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("left to the sweeper", events=len(self._held))

    def _log_capacity(self, has_capacity: bool) -> None:
        if has_capacity != self._has_capacity:
            self._has_capacity = has_capacity
            log.warning(
                "the outbox publisher has capacity again"
                if has_capacity
                else "the outbox publisher is full and leaves new events to the sweeper"
            )

    def _delivered(self, rows: list[OutboxRow], size: int, failures: list[PublishFailure]) -> None:
        self._count -= len(rows)
        self._bytes -= size
        if failures:
            failed = {index for index, _ in failures}
            STAGE_PUBLISH_FAILURES.labels("api").inc(len(failed))
            log.warning("not published, left to the sweeper", events=len(failed), error=str(failures[0][1]))
            self._release([rows[index] for index in failed])
            rows = [row for index, row in enumerate(rows) if index not in failed]
        if not rows:
            return
        self._published.inc(len(rows))
        self._acked += rows
        if self._draining or len(self._acked) >= _DELETE_COUNT:
            self._start_deletion()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_DELETE_INTERVAL, self._start_deletion)

    def _start_deletion(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._acked:
            return
        acked, self._acked = self._acked, []
        task = asyncio.ensure_future(self._delete(acked))
        self._deleting.add(task)
        task.add_done_callback(self._deleting.discard)

    async def _delete(self, acked: list[OutboxRow]) -> None:
        # The rows stay held until they are deleted, so that the sweeper does not publish them again.
        try:
            results = await self._deleter.many(acked)
        finally:
            self._release(acked)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            log.warning("published but still in the outbox", events=len(errors), error=error_text(errors[0]))

    def _release(self, rows: list[OutboxRow]) -> None:
        self._held.difference_update(rows)
        if not self._held:
            self._idle.set()
