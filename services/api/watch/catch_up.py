"""A catch-up: reads what watchers missed, from their positions to the live reader's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from confluent_kafka import KafkaError, KafkaException, Message

from services.api.watch.applied_changes import AppliedChange, ChangeApplier, LookUp, watch_messages
from services.api.watch.changes import Change
from services.api.watch.errors import kafka_unavailable
from services.api.watch.event_consumer import EventConsumer
from services.api.watch.folded_offsets import FoldedOffsets
from services.api.watch.messages import WatchMessage
from services.api.watch.partition_merge import PartitionMerge
from services.api.watch.reorder_buffer import ReorderBuffer
from services.api.watch.subscribers import SafePositions, Subscriber, Subscribers
from services.common.config import Settings
from services.common.kafka.topic_partition import RecordLocation, TopicPartition

__all__ = ["TOKEN_INTERVAL", "CatchUp", "token_groups"]

R = TypeVar("R")

TOKEN_INTERVAL = 32
"""Changes from one token to the next. A client that disconnects between two reads them again."""

_MAX_RECORDS = 500
_FETCH_TIMEOUT = 0.2
_KAFKA_TIMEOUT = 15.0
_FETCH_KBYTES = 1 << 10


class CatchUp:
    """Reads once what several subscribers missed, from their earliest position on.

    Blocking calls run on `executor`. `safe` holds the positions before which it has yielded every message. An
    async context manager, which opens its consumer only when it needs one.

    Methods raise StatusError UNAVAILABLE where Kafka does not answer, and what `look_up` raises.
    """

    def __init__(
        self, settings: Settings, executor: Executor, subscribers: Iterable[Subscriber], look_up: LookUp
    ) -> None:
        self._settings, self._executor, self._look_up = settings, executor, look_up
        self.subscribers = Subscribers(subscribers)
        self._next = self.subscribers.earliest_positions()
        self.safe = SafePositions.of(self._next)
        self._consumer: EventConsumer | None = None
        self._applier: ChangeApplier | None = None
        self._begun: set[TopicPartition] = set()
        self._began_ms = 0
        # A cancelled call still runs on its thread, and the consumer serves one thread at a time.
        self._lock = threading.Lock()

    async def __aenter__(self) -> CatchUp:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._executor.submit(self._locked, self._close)

    async def begin_at_fold(self, folded: FoldedOffsets) -> None:
        """Begin at the status service's offsets instead of the subscribers' positions."""
        consumer = await self._run(self._open)
        begins = await self._run(lambda: consumer.begin_offsets(consumer.partitions()))
        offsets = await self._run(lambda: folded.read(begins))
        self._next = {partition: max(begin, offsets.get(partition, 0)) for partition, begin in begins.items()}
        self.safe = SafePositions.of(self._next)

    def distance(self, ends: Mapping[TopicPartition, int]) -> int:
        """Return the number of offsets before these positions that it has not read."""
        return sum(max(0, end - self._next.get(partition, 0)) for partition, end in ends.items())

    async def remove_expired(self, live: Mapping[TopicPartition, int]) -> list[Subscriber]:
        """Remove and return the subscribers whose records were deleted, or whose token is of other topics.

        `live` are the live reader's positions. Another replica, which gave the token, may be a little ahead.
        """
        subscribers = list(self.subscribers)
        behind = [partition for partition, end in live.items() if self._next.get(partition, 0) < end]
        ahead = {
            partition
            for subscriber in subscribers
            for partition, offset in subscriber.positions.items()
            if offset > live.get(partition, 0)
        }
        if not behind and not ahead:
            return []
        consumer = await self._run(self._open)
        unknown = ahead - set(await self._run(consumer.partitions)) if ahead else set()
        begins = await self._run(lambda: consumer.begin_offsets(behind))
        ends = await self._run(lambda: consumer.end_offsets(ahead - unknown))
        expired = [subscriber for subscriber in subscribers if subscriber.has_expired(begins, ends, unknown)]
        for subscriber in expired:
            self.subscribers.remove(subscriber)
        self._next = self.subscribers.earliest_positions()
        self.safe = SafePositions.of(self._next)
        return expired

    async def read(
        self, ends: Mapping[TopicPartition, int]
    ) -> AsyncIterator[tuple[Subscriber, WatchMessage | None]]:
        """Yield the messages of all changes before these positions, each with its subscriber.

        Yields None for a subscriber, and nothing more, where records were deleted before it received them.
        """
        unread = {partition for partition, end in ends.items() if self._next.get(partition, 0) < end}
        if not unread:
            return
        consumer = await self._run(self._open)
        merge, open_, paused = PartitionMerge(unread), set(unread), set[TopicPartition]()
        start = [consumer.native(partition, self._next.get(partition, 0)) for partition in unread]
        await self._run(lambda: consumer.consumer.assign(start))
        last_fetch = time.monotonic()
        while open_:
            fetched = await self._run(lambda: consumer.fetch(_MAX_RECORDS, _FETCH_TIMEOUT))
            if fetched:
                last_fetch = time.monotonic()
            elif time.monotonic() - last_fetch > _KAFKA_TIMEOUT:
                raise kafka_unavailable()
            for message in fetched:
                if _is_deleted(message):
                    partition = consumer.partition_of(message)
                    for expired in await self._skip_deleted(consumer, partition, ends, open_, merge):
                        yield expired, None
                else:
                    self._add(consumer, message, ends, open_, merge)
            if changes := merge.release():
                async for sent in self._dispatch(changes, changes[-1].at_ms / 1000, merge):
                    yield sent
            ahead = merge.ahead() & open_
            if to_pause := [consumer.native(partition) for partition in ahead - paused]:
                await self._run(partial(consumer.consumer.pause, to_pause))
            if to_resume := [consumer.native(partition) for partition in paused - ahead]:
                await self._run(partial(consumer.consumer.resume, to_resume))
            paused = ahead

    async def release_held(
        self, live_held: Collection[RecordLocation]
    ) -> AsyncIterator[tuple[Subscriber, WatchMessage]]:
        """Yield the messages of all held changes, except those that the live reader holds and will send."""
        if self._applier is not None:
            async for sent in self._dispatch([], float("inf"), None, live_held):
                yield sent

    def _add(
        self,
        consumer: EventConsumer,
        message: Message,
        ends: Mapping[TopicPartition, int],
        open_: set[TopicPartition],
        merge: PartitionMerge,
    ) -> None:
        """Add a fetched record, or note a partition's end."""
        error = message.error()
        if error is not None and error.code() != KafkaError._PARTITION_EOF:
            return
        partition, offset = consumer.partition_of(message), message.offset() or 0
        if error is None and partition in open_ and offset < ends[partition]:
            if partition not in self._begun:
                # The start positions have different times. Only after the latest of them nothing is missing.
                self._begun.add(partition)
                self._began_ms = max(self._began_ms, message.timestamp()[1])
            self._next[partition] = offset + 1
            if self.subscribers.may_select(message.key()) and (change := consumer.change_of(message)):
                merge.add(change)
        # A partition's end counts only at its last offset or later. A new leader reports an earlier end while
        # it does not know yet which records are committed. More records follow.
        after = offset + 1 if error is None else offset
        if partition in open_ and after >= ends[partition]:
            self._next[partition] = max(self._next.get(partition, 0), ends[partition])
            open_.discard(partition)
            merge.end(partition)

    async def _skip_deleted(
        self,
        consumer: EventConsumer,
        partition: TopicPartition,
        ends: Mapping[TopicPartition, int],
        open_: set[TopicPartition],
        merge: PartitionMerge,
    ) -> list[Subscriber]:
        """Continue at the partition's first record; remove and return the subscribers that miss records."""
        if partition not in open_:
            return []
        begin = (await self._run(lambda: consumer.begin_offsets([partition])))[partition]
        before = self._next.get(partition, 0)
        expired = [s for s in self.subscribers if max(before, s.position(partition)) < begin]
        for subscriber in expired:
            self.subscribers.remove(subscriber)
        self._next[partition] = max(before, begin)
        if self._next[partition] >= ends[partition]:
            open_.discard(partition)
            merge.end(partition)
        await self._run(lambda: consumer.reassign(partition, self._next[partition]))
        return expired

    async def _dispatch(
        self,
        changes: list[Change],
        now: float,
        merge: PartitionMerge | None,
        live_held: Collection[RecordLocation] = (),
    ) -> AsyncIterator[tuple[Subscriber, WatchMessage]]:
        if self._applier is None:
            # This buffer's time is the records' time.
            self._applier = ChangeApplier(ReorderBuffer(self._began_ms), self._look_up)
        applied = await self._applier.release(changes, now, live_held)
        for group, left in token_groups(applied):
            unsent = [*left.items(), *(merge.first_offsets().items() if merge else ())]
            for held in (*live_held, *self._applier.buffer.held()):
                unsent.append((TopicPartition(held.topic, held.partition), held.offset))
            safe = self._safe_positions(unsent)
            for subscriber, message, is_last in watch_messages(group, self.subscribers.find, ""):
                yield subscriber, subscriber.with_token(message, safe if is_last else self.safe)
            self.safe = safe

    def _safe_positions(self, unsent: Iterable[tuple[TopicPartition, int]]) -> SafePositions:
        """Return the positions before which every message was sent, given the offsets that were not."""
        safe = dict(self._next)
        for partition, offset in unsent:
            safe[partition] = min(safe[partition], offset)
        return SafePositions.of(safe)

    # --- blocking calls ----------------------------------------------------------------------

    async def _run(self, function: Callable[[], R]) -> R:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._locked, function)
        except (KafkaException, TimeoutError):
            raise kafka_unavailable() from None

    def _locked(self, function: Callable[[], R]) -> R:
        with self._lock:
            return function()

    def _open(self) -> EventConsumer:
        if self._consumer is None:
            self._consumer = EventConsumer(self._settings, lambda _: None, _FETCH_KBYTES, report_ends=True)
        return self._consumer

    def _close(self) -> None:
        if self._consumer is not None:
            self._consumer.close()


def _is_deleted(message: Message) -> bool:
    error = message.error()
    return error is not None and error.code() == KafkaError._AUTO_OFFSET_RESET


def token_groups(
    changes: Sequence[AppliedChange],
) -> list[tuple[Sequence[AppliedChange], dict[TopicPartition, int]]]:
    """Split changes into groups that each end with a token.

    Return each group with the lowest offset a partition of what follows it.
    """
    left: dict[TopicPartition, int] = {}
    found: list[tuple[Sequence[AppliedChange], dict[TopicPartition, int]]] = []
    for start in reversed(range(0, len(changes), TOKEN_INTERVAL)):
        group = changes[start : start + TOKEN_INTERVAL]
        found.append((group, dict(left)))
        for change, _ in group:
            left[change.partition] = min(change.offset, left.get(change.partition, change.offset))
    return found[::-1]
