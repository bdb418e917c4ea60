"""Kafka in memory: logs with gaps in their offsets, and consumer groups.

Groups are KIP-848's: incremental assignments, partitions leave one member before another has them, a
member that is silent for its session is put out and hears of it late, and commits of who is not a member
are refused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError

from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.consumer import Consumer

__all__ = ["SESSION", "Broker", "Group", "Message", "Place"]

SESSION = 10.0
"""The group's session timeout, in seconds."""

Place = tuple[str, int]
"""A topic and a partition."""


class Message:
    """A record as it is read."""

    __slots__ = ("_headers", "_key", "_offset", "_place", "_value")

    def __init__(self, place: Place, offset: int, key: Any, value: Any, headers: Any) -> None:
        self._place, self._offset, self._key, self._value, self._headers = place, offset, key, value, headers

    def topic(self) -> str:
        return self._place[0]

    def partition(self) -> int:
        return self._place[1]

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
        self.logs: dict[Place, _Log] = {(t, p): _Log() for t in topics for p in range(partitions)}
        self.groups: dict[str, Group] = {}

    def group(self, name: str) -> Group:
        """Return a group, made at its first mention."""
        if name not in self.groups:
            self.groups[name] = Group(self)
        return self.groups[name]

    def append(self, topic: str, key: bytes | None, value: bytes | None, headers: Any) -> int:
        """Add a record; a key goes to one partition always. Returns its offset."""
        place = topic, (key[-1] if key else 0) % self.partitions
        log = self.logs[place]
        rng = self.world.scheduler.rng
        # Transaction markers and compaction leave gaps.
        offset = log.end + (rng.randrange(1, 4) if rng.random() < 0.3 else 0)
        log.end = offset + 1
        log.offsets.append(offset)
        log.messages.append(Message(place, offset, key, value, headers))
        self.world.trace("kafka", f"{topic}/{place[1]}@{offset}")
        for group in self.groups.values():
            owner = group.owners.get(place)
            if owner is not None:
                owner.wake()
        return offset

    def read(self, place: Place, start: int, most: int) -> Sequence[Message]:
        """Return the records of a partition from offset `start` on."""
        log = self.logs[place]
        index = bisect_left(log.offsets, start)
        return log.messages[index : index + most]

    def records(self, topic: str) -> list[Message]:
        """Return all records of a topic."""
        return [message for p in range(self.partitions) for message in self.logs[topic, p].messages]


class Group:
    """The coordinator's view of one consumer group."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.members: list[Consumer] = []
        self.owners: dict[Place, Consumer] = {}
        self.committed: dict[Place, int] = {}
        self.topics: set[str] = set()

    def lag(self) -> int:
        """Return how many partitions have records above the committed position."""
        logs = self.broker.logs
        return sum(
            1
            for place, log in logs.items()
            if place[0] in self.topics and log.offsets and log.offsets[-1] >= self.committed.get(place, 0)
        )

    def join(self, member: Consumer, topics: Sequence[str]) -> None:
        """Take a new member in."""
        if not self.broker.world.up("kafka"):
            self.broker.world.scheduler.after(0.5, member.process, self.join, member, topics)
            return
        self.topics.update(topics)
        self.members.append(member)
        member.member = True
        member.epoch += 1
        self._balance()

    def leave(self, member: Consumer) -> None:
        """Let a member go, its partitions with it."""
        member.member = False
        if member in self.members:
            self.members.remove(member)
        for place in [place for place, owner in self.owners.items() if owner is member]:
            del self.owners[place]
        self._balance()

    def released(self, member: Consumer, epoch: int, places: Iterable[Place]) -> None:
        """Note that a member has given partitions up."""
        if member.epoch != epoch:
            return
        for place in places:
            if self.owners.get(place) is member:
                del self.owners[place]
                member.leaving.discard(place)
        self._balance()

    def commit(self, member: Consumer, epoch: int, positions: dict[Place, int]) -> KafkaError | None:
        """Commit for a member in the membership that it was in when it asked, or say why not."""
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
        revoked: dict[Consumer, list[Place]] = {}
        given: dict[Consumer, list[Place]] = {}
        for topic in sorted(self.topics):
            for partition in range(partitions):
                place = topic, partition
                # As "range" does: the same partition numbers of all topics to one member.
                target = self.members[partition * len(self.members) // partitions]
                owner = self.owners.get(place)
                if owner is None:
                    self.owners[place] = target
                    given.setdefault(target, []).append(place)
                elif owner is not target and place not in owner.leaving:
                    owner.leaving.add(place)
                    revoked.setdefault(owner, []).append(place)
        for member, places in revoked.items():
            member.tell("revoke", places)
        for member, places in given.items():
            member.tell("assign", places)
