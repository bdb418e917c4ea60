"""The live reader: dispatches the newest changes of the event topics to all watchers of a replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import structlog
from confluent_kafka import Message

from services.api.metrics import WATCH_HELD, WATCH_SECONDS
from services.api.watch import resume_tokens
from services.api.watch.applied_changes import ChangeApplier, LookUp, watch_messages
from services.api.watch.errors import kafka_unavailable
from services.api.watch.messages import WatchMessage
from services.api.watch.reorder_buffer import ReorderBuffer
from services.api.watch.topic_tail import TopicTail
from services.api.watch.watchers import Watcher, WatcherIndex
from services.common.config import Settings
from services.common.kafka.topic_partition import RecordLocation, TopicPartition

__all__ = ["JoinPoint", "LiveReader"]

log = structlog.get_logger(__name__)

# After a batch the reader pauses up to so many seconds for watchers with more waiting messages than this.
_MANY_WAITING, _MAX_PAUSE = 500, 0.05
_TOKEN_INTERVAL = 60.0


class JoinPoint(NamedTuple):
    """From where a watcher that joins now receives every change.

    That is from `positions` on, and the changes at `held` before them. `text` is the token's second part.
    """

    positions: dict[TopicPartition, int]
    held: frozenset[RecordLocation]
    text: str


class LiveReader:
    """Reads the event topics from their present ends until `stop`. Belongs to one event loop.

    `look_up` must not fail. The reader calls `on_end` when it cannot continue. Its owner counts the streams
    that use it in `users`.
    """

    def __init__(self, settings: Settings, look_up: LookUp, on_end: Callable[[LiveReader], None]) -> None:
        self.users = 0
        self._look_up, self._on_end = look_up, on_end
        self._index = WatcherIndex()
        self._recently_sent: set[Watcher] = set()
        self._positions: dict[TopicPartition, int] = {}
        self._join_point: JoinPoint | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = False
        self._dispatching: asyncio.Task[None] | None = None
        self._tokens_sent_at = time.monotonic()
        self._tail = TopicTail(settings, self._begin, self._end)
        self.thread = self._tail.thread
        """Ends soon after `stop`."""

    async def wait_ready(self) -> None:
        """Wait until it reads. Raises StatusError UNAVAILABLE where Kafka does not answer."""
        await asyncio.shield(self._ready)

    def join(self, watcher: Watcher) -> JoinPoint:
        """Queue every later message that the watcher selects; return from where. Requires `wait_ready`.

        Raises StatusError UNAVAILABLE where the reader has ended.
        """
        if self._stopping:
            raise kafka_unavailable()
        assert self._join_point is not None, "the reader is not ready"
        self._index.add(watcher)
        return self._join_point

    def positions(self) -> dict[TopicPartition, int]:
        """Return the offsets up to which it has read. Requires `wait_ready`."""
        assert self._join_point is not None, "the reader is not ready"
        return self._join_point.positions

    def leave(self, watcher: Watcher) -> None:
        """Queue no more messages for the watcher."""
        self._index.remove(watcher)
        self._recently_sent.discard(watcher)

    def stop(self) -> None:
        """Stop reading. No watcher receives anything more."""
        self._stopping = True
        self._tail.stop()
        if self._dispatching is not None:
            self._dispatching.cancel()
        self._fail_waiters()
        WATCH_HELD.set(0)

    def _begin(self, positions: dict[TopicPartition, int], began_ms: int) -> None:
        if self._stopping:
            return
        self._positions = positions
        self._applier = ChangeApplier(ReorderBuffer(began_ms), self._look_up)
        self._update_join_point()
        self._dispatching = asyncio.create_task(self._dispatch_all())
        self._ready.set_result(None)

    def _end(self, error: BaseException) -> None:
        if self._stopping:
            return
        log.warning("the live reader has ended", error=str(error))
        self.stop()
        for watcher in self._index:
            watcher.end(kafka_unavailable())
        self._on_end(self)

    def _fail_waiters(self) -> None:
        if not self._ready.done():
            self._ready.set_exception(kafka_unavailable())
            # asyncio logs an exception that nobody retrieves, and perhaps nobody waits.
            self._ready.exception()

    async def _dispatch_all(self) -> None:
        try:
            while True:
                batch = await self._next_batch()
                try:
                    await self._dispatch(batch)
                finally:
                    if batch:
                        self._tail.batch_done()
        except Exception as error:
            log.exception("unexpected")
            self._end(error)

    async def _next_batch(self) -> list[Message]:
        """Return the next batch; an empty one when a held change must be released."""
        timeout = self._applier.buffer.next_timeout()
        if timeout is None:
            return await self._tail.batches.get()
        try:
            async with asyncio.timeout(max(0.0, timeout - time.monotonic())):
                return await self._tail.batches.get()
        except TimeoutError:
            return []

    async def _dispatch(self, batch: list[Message]) -> None:
        """Queue the messages of a batch for the watchers that select them."""
        changes = []
        for message in batch:
            partition = self._tail.consumer.partition_of(message)
            self._positions[partition] = (message.offset() or 0) + 1
            if (change := self._tail.consumer.change_of(message)) is not None:
                changes.append(change)
        applied = await self._applier.release(changes, time.monotonic())
        before = self._join_point
        assert before is not None
        after = self._update_join_point()
        now_ms = time.time() * 1000
        for change, _ in applied:
            WATCH_SECONDS.observe(max(0.0, now_ms - change.at_ms) / 1000)
        receivers = set()
        for watcher, watch_message, is_last in watch_messages(
            applied, lambda one: self._index.find(one.row), before.text
        ):
            if is_last:
                receivers.add(watcher)
                watch_message = watch_message._replace(positions_text=after.text)  # noqa: PLW2901
            watcher.put(watch_message)
        self._recently_sent |= receivers
        self._send_tokens()
        await self._pause_for(receivers)

    async def _pause_for(self, receivers: Iterable[Watcher]) -> None:
        """Let watchers with many waiting messages catch up: reading is faster than writing to clients."""
        deadline = time.monotonic() + _MAX_PAUSE
        behind = {watcher: watcher.waiting for watcher in receivers if watcher.waiting > _MANY_WAITING}
        while behind and time.monotonic() < deadline:
            await asyncio.sleep(_MAX_PAUSE / 10)
            # A watcher that reads nothing does not prolong the pause.
            behind = {w: w.waiting for w, before in behind.items() if _MANY_WAITING < w.waiting < before}

    def _update_join_point(self) -> JoinPoint:
        held = frozenset(self._applier.buffer.held())
        WATCH_HELD.set(len(held))
        positions = dict(self._positions)
        safe = dict(positions)
        for topic, number, offset in held:
            partition = TopicPartition(topic, number)
            safe[partition] = min(safe[partition], offset)
        self._join_point = JoinPoint(positions, held, resume_tokens.encode_positions(safe))
        return self._join_point

    def _send_tokens(self) -> None:
        """Send a new token once a minute to watchers without messages, so that theirs does not expire."""
        if time.monotonic() - self._tokens_sent_at < _TOKEN_INTERVAL:
            return
        self._tokens_sent_at = time.monotonic()
        assert self._join_point is not None
        message = WatchMessage(b"", self._join_point.text, "")
        for watcher in self._index:
            if watcher not in self._recently_sent:
                watcher.put(message)
        self._recently_sent.clear()
