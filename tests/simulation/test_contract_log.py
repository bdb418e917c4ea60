"""The in-memory log and its groups behave like Kafka's under KIP-848. Each test runs on both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from services.common.config import Settings
from services.common.kafka.clients import consumer_config, producer_config
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import Names
from tests.groups import leave
from tests.simulation import broker as memory
from tests.simulation.consumer import Consumer as MemoryConsumer
from tests.simulation.process import Process
from tests.simulation.scheduler import Scheduler
from tests.simulation.threads import Thread
from tests.simulation.world import World
from tests.stack import Infra

_PARTITIONS = 2


class Member:
    """One member of the group, driven as the poller drives its consumer. `records` are those that it read."""

    def __init__(self, consumer: Any, topics: list[str]) -> None:
        self.consumer = consumer
        self.owned: set[TopicPartition] = set()
        self.revoked: list[TopicPartition] = []
        self.lost: list[TopicPartition] = []
        self.answers: list[Any] = []
        self.records: list[tuple[TopicPartition, int, bytes]] = []
        self.orders: list[Callable[[], None]] = []
        self.closed = False
        consumer.subscribe(topics, on_assign=self._assign, on_revoke=self._revoke, on_lost=self._lose)

    def turn(self) -> None:
        """Carry out the orders, and poll once."""
        while self.orders:
            self.orders.pop(0)()
        if self.closed:
            return
        message = self.consumer.poll(0.05)
        if message is not None and message.error() is None:
            partition = TopicPartition(message.topic(), message.partition())
            self.records.append((partition, message.offset(), message.value()))

    def _assign(self, consumer: Any, partitions: list[confluent_kafka.TopicPartition]) -> None:
        self.owned |= _plain(partitions)
        consumer.incremental_assign(partitions)

    def _revoke(self, consumer: Any, partitions: list[confluent_kafka.TopicPartition]) -> None:
        self.revoked += _plain(partitions)
        self.owned -= _plain(partitions)
        consumer.incremental_unassign(partitions)

    def _lose(self, consumer: Any, partitions: list[confluent_kafka.TopicPartition]) -> None:
        self.lost += _plain(partitions)
        self.owned -= _plain(partitions)
        consumer.incremental_unassign(partitions)


class Side:
    """What a test needs of a broker. `topics` are two topics of the test's own."""

    topics: list[str]

    def member(self) -> Member:
        """Start a member of the group."""
        raise NotImplementedError

    def produce(self, topic: str, key: bytes, value: bytes) -> None:
        """Produce one record, acked."""
        raise NotImplementedError

    def until(self, condition: Callable[[], Any]) -> None:
        """Let all members take turns until the condition holds. Fails after a time."""
        raise NotImplementedError

    def fence(self, member: Member) -> None:
        """Have the coordinator fence a member that does not know it. Returns after that."""
        raise NotImplementedError

    def order(self, member: Member, order: Callable[[], Any]) -> Any:
        """Have a member do something between two polls. Return its result or its KafkaException."""
        done: list[Any] = []

        def do() -> None:
            try:
                done.append(order())
            except KafkaException as error:
                done.append(error)

        member.orders.append(do)
        self.until(lambda: done)
        return done[0]

    def commit(self, member: Member, partition: TopicPartition, offset: int) -> Any:
        """Commit and wait. Return the error, or None."""
        answer = self.order(
            member,
            lambda: member.consumer.commit(offsets=[_position(partition, offset)], asynchronous=False),
        )
        if isinstance(answer, KafkaException):
            return answer.args[0]
        return next((p.error for p in answer if getattr(p, "error", None) is not None), None)

    def close(self, member: Member) -> None:
        """Have a member leave as the poller does."""

        def leave() -> None:
            member.consumer.unsubscribe()
            deadline = time.monotonic() + 20
            while member.owned and time.monotonic() < deadline:
                member.consumer.poll(0.05)
            member.closed = True
            member.consumer.close()

        self.order(member, leave)


class Memory(Side):
    """The simulation's broker, in virtual time."""

    def __init__(self) -> None:
        self.topics = ["a", "b"]
        self.scheduler = Scheduler(5)
        self.world = World(self.scheduler)
        self.broker = memory.Broker(self.world, self.topics, _PARTITIONS)
        self._members: list[Member] = []

    def member(self) -> Member:
        process = Process(self.scheduler, f"member-{len(self._members)}", "test")
        made: list[Member] = []

        def work() -> None:
            member = Member(
                MemoryConsumer(
                    self.broker,
                    process,
                    {"group.id": "g", "on_commit": lambda error, _: made[0].answers.append(error)},
                ),
                self.topics,
            )
            made.append(member)
            while not member.closed:
                member.turn()

        process.loop.call_soon(lambda: Thread(work).start())
        self.until(lambda: made)
        self._members += made
        return made[0]

    def produce(self, topic: str, key: bytes, value: bytes) -> None:
        self.broker.append(topic, key, value, [])

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = self.scheduler.now + 60
        while not condition():
            assert self.scheduler.now < deadline, "the condition did not come to hold in time"
            self.scheduler.run(self.scheduler.now + 0.01)

    def fence(self, member: Member) -> None:
        member.consumer.fence()

    def finish(self) -> None:
        """End all processes."""
        self.scheduler.dispose()


class Real(Side):
    """Kafka, under KIP-848."""

    def __init__(self, infra: Infra) -> None:
        prefix = infra.topic_prefix()
        self.topics = [prefix + "a", prefix + "b"]
        self.settings = Settings(kafka_bootstrap=infra.bootstrap, topic_prefix=prefix)
        self.admin = AdminClient({"bootstrap.servers": infra.bootstrap})
        for done in self.admin.create_topics([NewTopic(t, _PARTITIONS, 1) for t in self.topics]).values():
            done.result()
        self._producer = Producer(producer_config(self.settings, "contract"))
        self._members: list[Member] = []

    def member(self) -> Member:
        answers: list[Any] = []
        config = consumer_config(self.settings, "contract", "contract", gather=False) | {
            "on_commit": lambda error, _: answers.append(error)
        }
        made = Member(Consumer(config), self.topics)
        made.answers = answers
        self._members.append(made)
        return made

    def produce(self, topic: str, key: bytes, value: bytes) -> None:
        self._producer.produce(topic, value, key)
        assert self._producer.flush(20) == 0

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come to hold in time"
            for member in self._members:
                member.turn()

    def fence(self, member: Member) -> None:
        # To be silent until its session is over would take the member ten seconds.
        group = Names(self.settings.topic_prefix).group("contract")
        leave(self.settings.kafka_bootstrap, group, member.consumer.memberid())
        others = [other for other in self._members if other is not member and not other.closed]
        deadline = time.monotonic() + 40
        while any(len(other.owned) < len(self.topics) * _PARTITIONS for other in others):
            assert time.monotonic() < deadline, "the others did not get its partitions"
            for other in others:
                other.turn()

    def finish(self) -> None:
        """Close the open consumers and delete the topics."""
        for member in self._members:
            if not member.closed:
                # A close during a revocation can hang in librdkafka. Another test has a member leave.
                closing = threading.Thread(target=member.consumer.close, daemon=True)
                closing.start()
                closing.join(20)
        for done in self.admin.delete_topics(self.topics).values():
            done.result()


@pytest.fixture(params=["memory", "kafka"])
def side(request: pytest.FixtureRequest) -> Iterator[Memory | Real]:
    made = Memory() if request.param == "memory" else Real(request.getfixturevalue("infra"))
    yield made
    made.finish()


def _position(partition: TopicPartition, offset: int) -> confluent_kafka.TopicPartition:
    return confluent_kafka.TopicPartition(*partition, offset)


def _plain(partitions: list[confluent_kafka.TopicPartition]) -> set[TopicPartition]:
    return {TopicPartition(p.topic, p.partition) for p in partitions}


def everything(side: Side) -> set[TopicPartition]:
    return {TopicPartition(topic, partition) for topic in side.topics for partition in range(_PARTITIONS)}


def test_one_member_reads_all_partitions_and_the_records_of_each_key_in_order(side: Memory | Real) -> None:
    for number in range(20):
        side.produce(side.topics[0], bytes([number % 4]) * 16, b"%d" % number)
    member = side.member()
    side.until(lambda: len(member.records) == 20)
    assert member.owned == everything(side)
    for key in range(4):
        mine = [(place, offset, value) for place, offset, value in member.records if int(value) % 4 == key]
        assert len({place for place, _, _ in mine}) == 1, "all records of a key are in one partition"
        assert [int(value) for _, _, value in mine] == list(range(key, 20, 4))
        assert [offset for _, offset, _ in mine] == sorted(offset for _, offset, _ in mine)


def test_a_second_member_gets_the_same_partition_numbers_of_all_topics_after_the_revocation(
    side: Memory | Real,
) -> None:
    first = side.member()
    side.until(lambda: first.owned == everything(side))
    second = side.member()
    side.until(lambda: len(first.owned) == len(second.owned) == 2)
    assert first.owned | second.owned == everything(side)
    for member in (first, second):
        assert len({partition for _, partition in member.owned}) == 1
    assert sorted(first.revoked) == sorted(second.owned), (
        "the partitions that a member keeps are never revoked"
    )
    assert first.lost == second.lost == []


def test_the_next_member_starts_at_the_committed_offset(side: Memory | Real) -> None:
    for number in range(6):
        side.produce(side.topics[0], b"k" * 16, b"%d" % number)
    first = side.member()
    side.until(lambda: len(first.records) == 6)
    place, offset, _ = first.records[3]
    assert side.commit(first, place, offset) is None
    side.close(first)
    assert set(first.revoked) == everything(side), "its partitions are revoked before it leaves"
    second = side.member()
    side.until(lambda: len(second.records) == 3)
    assert second.records == first.records[3:]


def test_an_asynchronous_commit_is_answered_inside_a_later_poll(side: Memory | Real) -> None:
    member = side.member()
    side.until(lambda: member.owned == everything(side))
    position = _position(TopicPartition(side.topics[0], 0), 0)
    side.order(member, lambda: member.consumer.commit(offsets=[position], asynchronous=True))
    side.until(lambda: member.answers)
    assert member.answers == [None]


def test_a_fenced_member_cannot_commit_and_rejoins_without_partitions(side: Memory | Real) -> None:
    side.produce(side.topics[0], b"k" * 16, b"0")
    first = side.member()
    side.until(lambda: first.records)
    second = side.member()
    side.until(lambda: len(first.owned) == len(second.owned) == 2)
    holder, other = (first, second) if first.records[0][0] in first.owned else (second, first)
    side.until(lambda: any(record[0] in holder.owned for record in holder.records))
    place, offset, _ = next(record for record in holder.records if record[0] in holder.owned)
    side.fence(holder)
    error = side.commit(holder, place, offset + 1)
    assert error is not None
    side.until(lambda: holder.lost)
    assert place in holder.lost
    # Another member reads what the fenced one had not committed.
    side.until(lambda: any(record[:2] == (place, offset) for record in other.records))
    side.until(lambda: len(holder.owned) == len(other.owned) == 2)
    assert holder.owned | other.owned == everything(side)


def test_a_paused_partition_delivers_nothing_until_it_resumes_from_where_it_was_sought(
    side: Memory | Real,
) -> None:
    member = side.member()
    side.until(lambda: member.owned == everything(side))
    side.produce(side.topics[0], b"k" * 16, b"0")
    side.until(lambda: len(member.records) == 1)
    place, offset, _ = member.records[0]
    partition = confluent_kafka.TopicPartition(*place)
    side.order(member, lambda: member.consumer.pause([partition]))
    side.order(member, lambda: member.consumer.seek(_position(place, offset)))
    side.produce(side.topics[0], b"k" * 16, b"1")
    # A record of the other topic shows that the paused one had time enough.
    side.produce(side.topics[1], b"k" * 16, b"2")
    side.until(lambda: len(member.records) == 2)
    assert member.records[1][2] == b"2"
    side.order(member, lambda: member.consumer.resume([partition]))
    side.until(lambda: len(member.records) == 4)
    assert [value for _, _, value in member.records[2:]] == [b"0", b"1"]
