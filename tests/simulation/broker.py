"""Kafka in memory: logs with gaps in their offsets, and consumer groups.

Groups follow KIP-848. Assignments are incremental, and a partition leaves one member before another gets it.
The coordinator fences a member whose session has timed out, and the member learns of that late. The
coordinator refuses the commits of clients that are not members.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError

from services.common.kafka.topic_partition import TopicPartition
from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.consumer import Consumer

__all__ = ["SESSION", "Broker", "Group", "Message"]

SESSION = 10.0
"""The session timeout of a group in seconds."""


class Message:
    """A record as a consumer returns it."""

    __slots__ = ("_headers", "_key", "_offset", "_place", "_value")

    def __init__(self, place: TopicPartition, offset: int, key: Any, value: Any, headers: Any) -> None:
        self._place, self._offset, self._key, self._value, self._headers = place, offset, key, value, headers

    def topic(self) -> str:
        return self._place.topic

    def partition(self) -> int:
        return self._place.partition

    def offset(self) -> int:
        return self._offset

    def key(self) -> Any:
        return self._key

    def value(self) -> Any:
        return self._value

    def headers(self) -> Any:
        return self._headers

    def error(self) -> None:
        return None


class _Log:
    """One partition."""

    __slots__ = ("end", "messages", "offsets")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.offsets: list[int] = []
        self.end = 0


class Broker:
    """All topics and groups."""

    def __init__(self, world: World, topics: Iterable[str], partitions: int = 2) -> None:
        self.world = world
        self.partitions = partitions
        self.logs: dict[TopicPartition, _Log] = {
            TopicPartition(t, p): _Log() for t in topics for p in range(partitions)
        }
        self.groups: dict[str, Group] = {}

    def group(self, name: str) -> Group:
        """Return a group; the first call for a name makes it."""
        if name not in self.groups:
            self.groups[name] = Group(self)
        return self.groups[name]

    def append(self, topic: str, key: bytes | None, value: bytes | None, headers: Any) -> int:
        """Append a record to the partition of its key. Return its offset."""
        place = TopicPartition(topic, (key[-1] if key else 0) % self.partitions)
        log = self.logs[place]
        rng = self.world.scheduler.rng
        # Transaction markers and compaction leave gaps.
        offset = log.end + (rng.randrange(1, 4) if rng.random() < 0.3 else 0)
        log.end = offset + 1
        log.offsets.append(offset)
        log.messages.append(Message(place, offset, key, value, headers))
        self.world.trace("kafka", f"{topic}/{place.partition}@{offset}")
        for group in self.groups.values():
            owner = group.owners.get(place)
            if owner is not None:
                owner.wake()
        return offset

    def read(self, place: TopicPartition, start: int, most: int) -> Sequence[Message]:
        """Return the records of a partition from offset `start` on."""
        log = self.logs[place]
        index = bisect_left(log.offsets, start)
        return log.messages[index : index + most]

    def records(self, topic: str) -> list[Message]:
        """Return all records of a topic."""
        return [
            message
            for p in range(self.partitions)
            for message in self.logs[TopicPartition(topic, p)].messages
        ]


class Group:
    """The coordinator's view of one consumer group."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.members: list[Consumer] = []
        self.owners: dict[TopicPartition, Consumer] = {}
        self.committed: dict[TopicPartition, int] = {}
        self.topics: set[str] = set()

    def lag(self) -> int:
        """Return how many partitions have records above the committed offset."""
        logs = self.broker.logs
        return sum(
            1
            for place, log in logs.items()
            if place.topic in self.topics and log.offsets and log.offsets[-1] >= self.committed.get(place, 0)
        )

    def join(self, member: Consumer, topics: Sequence[str]) -> None:
        """Add a member."""
        if not self.broker.world.up("kafka"):
            self.broker.world.scheduler.after(0.5, member.process, self.join, member, topics)
            return
        self.topics.update(topics)
        self.members.append(member)
        member.member = True
        member.epoch += 1
        self._balance()

    def leave(self, member: Consumer) -> None:
        """Remove a member and take its partitions."""
        member.member = False
        if member in self.members:
            self.members.remove(member)
        for place in [place for place, owner in self.owners.items() if owner is member]:
            del self.owners[place]
        self._balance()

    def released(self, member: Consumer, epoch: int, places: Iterable[TopicPartition]) -> None:
        """Note that a member has released partitions."""
        if member.epoch != epoch:
            return
        for place in places:
            if self.owners.get(place) is member:
                del self.owners[place]
                member.leaving.discard(place)
        self._balance()

    def commit(self, member: Consumer, epoch: int, positions: dict[TopicPartition, int]) -> KafkaError | None:
        """Commit offsets, or return the error when the member's epoch is over."""
        if not member.member or member.epoch != epoch:
            return KafkaError(KafkaError.UNKNOWN_MEMBER_ID)
        for place, position in positions.items():
            member.check(place, position)
            self.committed[place] = position
        return None

    def _balance(self) -> None:
        if not self.members:
            return
        partitions = self.broker.partitions
        revoked: dict[Consumer, list[TopicPartition]] = {}
        given: dict[Consumer, list[TopicPartition]] = {}
        for topic in sorted(self.topics):
            for partition in range(partitions):
                place = TopicPartition(topic, partition)
                # Like the range assignor: a member gets the same partition numbers of all topics.
                target = self.members[partition * len(self.members) // partitions]
                owner = self.owners.get(place)
                if owner is None:
                    self.owners[place] = target
                    given.setdefault(target, []).append(place)
                elif owner is not target and place not in owner.leaving:
                    owner.leaving.add(place)
                    revoked.setdefault(owner, []).append(place)
        for member, places in revoked.items():
            member.notify("revoke", places)
        for member, places in given.items():
            member.notify("assign", places)
