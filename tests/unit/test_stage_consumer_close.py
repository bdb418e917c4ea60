"""How the poller leaves its group: within a bound, though librdkafka's close may hang."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from services.common.config import Settings
from services.common.events import DECODERS
from services.common.kafka.pace import awaited_fetches
from services.common.stage import membership, poller
from services.common.stage.in_flight_limit import InFlightLimit
from services.common.stage.partition_tracker import PartitionTracker
from services.common.stage.poller import Poller
from services.common.stage.record_reader import RecordReader
from services.common.stage.types import Done, Stage
from tests.librdkafka import library, mock_cluster

TOPIC = "task.created"


class FakeConsumer:
    """Owns one partition. Its `close` hangs where a revocation is left to it, or always if `hangs`.

    So does librdkafka: an operation that a rebalance callback sends to a group that has terminated meanwhile
    never gets a response. A revocation also names the partitions of `more`, which are not assigned.
    """

    def __init__(
        self, *, hangs: bool = False, more: Sequence[TopicPartition] = (), revoke_seconds: float = 0
    ) -> None:
        self.hangs, self.more, self.revoke_seconds = hangs, more, revoke_seconds
        self.owned = [TopicPartition(TOPIC, 0)]
        self.calls: list[tuple[str, str]] = []
        self.events: list[Callable[[], None]] = []
        self.released = threading.Event()

    def _note(self, call: str) -> None:
        self.calls.append((call, threading.current_thread().name))

    def subscribe(self, topics: list[str], *, on_assign: Any, on_revoke: Any, on_lost: Any) -> None:
        self.on_revoke = on_revoke
        self.events.append(lambda: on_assign(self, list(self.owned)))

    def unsubscribe(self) -> None:
        self._note("unsubscribe")
        self.events.append(lambda: self.on_revoke(self, [*self.owned, *self.more]))

    def poll(self, timeout: float) -> None:
        self._note("poll")
        while self.events:
            self.events.pop(0)()

    def consume(self, most: int, timeout: float) -> list[Any]:
        self.poll(timeout)
        return []

    def close(self) -> None:
        self._note("close")
        if self.hangs or self.owned:
            self.released.wait()

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        self._note("assign")

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        self._note("unassign")
        time.sleep(self.revoke_seconds)
        if any(partition not in self.owned for partition in partitions):
            raise KafkaException(KafkaError(KafkaError._INVALID_ARG))
        self.owned = []

    def assignment(self) -> list[TopicPartition]:
        return self.owned

    def committed(self, partitions: list[TopicPartition], timeout: float) -> None:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    def resume(self, partitions: list[TopicPartition]) -> None:
        self._note("resume")

    def pause(self, partitions: list[TopicPartition]) -> None:
        self._note("pause")

    def memberid(self) -> str:
        return "member"


class Rig:
    """A poller over one FakeConsumer, with how it ended."""

    def __init__(self, consumer: Any) -> None:
        stage = Stage("validator", [TOPIC], DECODERS, handle=lambda _: Done())
        tracker = PartitionTracker(InFlightLimit(10, 1 << 20))
        self.consumer, self.ends, self.ended = consumer, list[BaseException | None](), threading.Event()
        self.poller = Poller(
            {},
            [TOPIC],
            RecordReader(stage, Settings(), tracker),
            tracker,
            stage="validator",
            pace=awaited_fetches(),
            revoke_seconds=0.0,
            drain_seconds=0.1,
            dispatch=lambda records: None,
            cancel=lambda assignments, seconds: None,
            ended=self._on_end,
            consumer=lambda config: consumer,
        )

    def _on_end(self, error: BaseException | None) -> None:
        self.ends.append(error)
        self.ended.set()

    def run(self, until: Callable[[], object]) -> BaseException | None:
        """Start, wait for `until`, stop, and return with what it ended."""
        self.poller.start()
        for _ in range(1000):
            if until():
                break
            self.ended.wait(0.005)
        assert until()
        self.poller.stop()
        try:
            assert self.ended.wait(5), "the poller never ended"
        finally:
            self.consumer.released.set()
        return self.ends[0]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "_CLOSE_SECONDS", 0.1, raising=False)


def test_a_revocation_is_over_before_the_consumer_is_closed() -> None:
    consumer = FakeConsumer()
    assert Rig(consumer).run(lambda: consumer.calls) is None
    names = [name for name, _ in consumer.calls]
    assert names.index("unsubscribe") < names.index("unassign") < names.index("close")
    assert {thread for _, thread in consumer.calls} == {"poller"}


def test_a_revocation_of_partitions_that_are_not_assigned_is_over_before_close_too() -> None:
    consumer = FakeConsumer(more=[TopicPartition(TOPIC, 1)])
    assert Rig(consumer).run(lambda: consumer.calls) is None
    assert consumer.owned == []


def test_a_drain_ends_well_though_close_hangs() -> None:
    consumer = FakeConsumer(hangs=True)
    rig = Rig(consumer)
    assert rig.run(lambda: consumer.calls) is None
    assert {thread for _, thread in consumer.calls} == {"poller"}


def test_what_ended_the_stage_is_told_though_close_hangs() -> None:
    consumer = FakeConsumer(hangs=True)
    consumer.events.append(lambda: 1 // 0)
    rig = Rig(consumer)
    assert isinstance(rig.run(rig.ended.is_set), ZeroDivisionError)


def test_a_consumer_that_is_replaced_and_does_not_close_ends_the_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "_MAX_SILENCE", 0.0)
    rig = Rig(FakeConsumer(hangs=True))
    error = rig.run(rig.ended.is_set)
    assert isinstance(error, TimeoutError)
    assert "did not close" in str(error)


def test_a_revocation_that_takes_long_ends_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the coordinator is away: librdkafka keeps the commit for a session timeout."""
    monkeypatch.setattr(membership, "_MAX_SILENCE", 0.0)
    consumer = FakeConsumer(revoke_seconds=0.3)
    rig = Rig(consumer)
    assert rig.run(lambda: ("close", "poller") in consumer.calls) is None


class _Refused(Consumer):
    """A real Consumer on librdkafka's mock cluster, to which librdkafka refuses the first assignment."""

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        super().incremental_unassign([TopicPartition("unknown", 0)])

    def close(self) -> None:
        # Otherwise it would wait for the refused assignment.
        super().incremental_assign([])
        super().close()


def test_a_bare_kafka_error_from_a_callback_ends_the_stage() -> None:
    config = {
        "group.id": "g",
        "partition.assignment.strategy": "cooperative-sticky",
        "test.mock.num.brokers": 1,
    }
    consumer = _Refused(config)
    api = library()
    cluster = mock_cluster(consumer)
    assert api.rd_kafka_mock_topic_create(cluster, TOPIC.encode(), 1, 1) == 0
    api.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, ctypes.c_int32(0))
    rig = Rig(consumer)
    rig.poller.start()
    assert rig.ended.wait(20)
    rig.poller._thread.join(5)
    assert not rig.poller._thread.is_alive()
    assert "callback failed" in str(rig.ends[0])
