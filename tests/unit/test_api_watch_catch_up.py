"""A catch-up of Watch: it sends each subscriber what it missed, and tokens that skip nothing."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from confluent_kafka import KafkaError

from postroad.v1 import events_pb2 as ev
from services.api.filters import Filter
from services.api.token_keys import TokenKeys
from services.api.watch import catch_up, resume_tokens
from services.api.watch.changes import Change
from services.api.watch.lookup import KnownTasks
from services.api.watch.messages import WatchMessage
from services.api.watch.subscribers import Subscriber
from services.api.watch.watchers import Watcher, WatchSelection
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import EVENT_TOPICS
from tests.watch_changes import MADE_MS, mail, read

KEYS = TokenKeys([b"k" * 32])


class FakeRecord:
    """A record of task.created as the client returns it; an end, or a deletion, of its partition."""

    def __init__(self, number: int, offset: int, end: bool = False, deleted: bool = False) -> None:
        self.at, self._end, self._deleted = offset, end, deleted
        self.partition = TopicPartition(EVENT_TOPICS[0], number)
        self.task = mail(2 * offset + number)

    def error(self) -> KafkaError | None:
        if self._deleted:
            return KafkaError(KafkaError._AUTO_OFFSET_RESET)
        return KafkaError(KafkaError._PARTITION_EOF) if self._end else None

    def offset(self) -> int:
        return self.at

    def key(self) -> bytes:
        return self.task.id

    def timestamp(self) -> tuple[int, int]:
        return 1, MADE_MS


class FakeConsumer:
    """Returns these lists, one a fetch. `begin` is the first offset that each partition still has."""

    def __init__(self, turns: list[list[FakeRecord]], begin: int = 0) -> None:
        self._turns, self._begin = turns, begin
        self.consumer = self
        self.reassigned: list[tuple[TopicPartition, int]] = []

    def fetch(self, max_records: int, timeout: float) -> list[FakeRecord]:
        return self._turns.pop(0)

    def partition_of(self, record: FakeRecord) -> TopicPartition:
        return record.partition

    def change_of(self, record: FakeRecord) -> Change:
        created = ev.TaskCreated(task=record.task, at_us=MADE_MS * 1000)
        return read(created, record.at)._replace(partition=record.partition)

    def native(self, partition: TopicPartition, offset: int = 0) -> object:
        return partition

    def assign(self, partitions: object) -> None:
        pass

    def begin_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, self._begin)

    def reassign(self, partition: TopicPartition, offset: int) -> None:
        self.reassigned.append((partition, offset))

    def close(self) -> None:
        pass


async def test_a_premature_end_of_a_partition_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # A new leader does not know at first which records are committed, and reports an end too early.
    turns = [
        [FakeRecord(0, 0), FakeRecord(0, 1, end=True), FakeRecord(1, 3, end=True)],
        [FakeRecord(0, 1), FakeRecord(0, 2), FakeRecord(0, 3, end=True)],
    ]
    monkeypatch.setattr(catch_up, "EventConsumer", lambda *_, **__: FakeConsumer(turns))
    [messages] = await messages_of([Filter()], [{}], {(EVENT_TOPICS[0], 0): 3, (EVENT_TOPICS[0], 1): 2})
    assert len(messages) == 3
    assert not turns


async def messages_of(
    filters: list[Filter], positions: list[dict[TopicPartition, int]], ends: dict[TopicPartition, int]
) -> list[list[Any]]:
    """Return what each subscriber receives up to these ends, None last where records were deleted."""
    settings: Any = None

    async def nothing(_: object) -> KnownTasks:
        return KnownTasks({}, set())

    scope = asyncio.timeout(None)
    watchers = [Watcher(WatchSelection("default", None, asked), scope) for asked in filters]
    subscribers = [Subscriber(watcher, at) for watcher, at in zip(watchers, positions, strict=True)]
    messages: dict[Watcher, list[WatchMessage | None]] = {watcher: [] for watcher in watchers}
    with ThreadPoolExecutor(1) as executor:
        async with catch_up.CatchUp(settings, executor, subscribers, nothing) as reader:
            async for subscriber, message in reader.read(ends):
                messages[subscriber.watcher].append(message)
    return list(messages.values())


async def test_subscribers_catch_up_together_each_from_its_own_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = TopicPartition(EVENT_TOPICS[0], 0), TopicPartition(EVENT_TOPICS[0], 1)
    records = [FakeRecord(n, offset) for offset in range(2, 100) for n in (0, 1)]
    monkeypatch.setattr(
        catch_up, "EventConsumer", lambda *_, **__: FakeConsumer([records[:150], records[150:]])
    )
    starts = [{one: 2, other: 90}, {one: 60, other: 2}, {one: 97, other: 96}]
    filters = [Filter(), Filter(), Filter(email="a196@x.test")]
    several = await messages_of(filters, starts, {one: 100, other: 100})
    assert [len(messages) for messages in several] == [98 + 10, 40 + 98, 1]
    for messages, start in zip(several, starts, strict=True):
        before = start
        for message in messages:
            at = resume_tokens.decode(KEYS, resume_tokens.token(KEYS, b"", message.positions_text), b"")
            # No token goes back, and none skips what its watcher has not received.
            assert all(at[partition] >= before[partition] for partition in start)
            before = at
        assert before == {one: 100, other: 100} | {p: 0 for p in before if p not in start}


async def test_deleted_records_end_only_subscribers_that_have_not_received_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = TopicPartition(EVENT_TOPICS[0], 0), TopicPartition(EVENT_TOPICS[0], 1)
    consumer = FakeConsumer(
        [
            [FakeRecord(1, 0), FakeRecord(0, 0, deleted=True)],
            [FakeRecord(1, 1), *(FakeRecord(0, offset) for offset in range(40, 60))],
        ],
        begin=40,
    )
    monkeypatch.setattr(catch_up, "EventConsumer", lambda *_, **__: consumer)
    starts: list[dict[TopicPartition, int]] = [{}, {one: 40}, {one: 50, other: 1}]
    stale, whole, ahead = await messages_of([Filter()] * 3, starts, {one: 60, other: 2})
    assert stale == [None]
    assert (len(whole), len(ahead)) == (22, 11)
    assert None not in whole + ahead
    assert consumer.reassigned == [(one, 40)]
