"""Asks Kafka how far the stages are. Blocks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

from confluent_kafka import OFFSET_INVALID, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from services.cli import kafka
from services.cli.lag.sample import Group, Head, Member, Place, Sample
from services.common.config import Settings
from services.common.kafka import group_description
from services.common.kafka.clients import plain_config
from services.common.kafka.records import Headers, parse_number, readable_headers
from services.common.kafka.topics import Names, delay_of
from services.common.stages import STAGES

__all__ = ["Reader"]

_PATIENCE = 3.0
"""Seconds that the first records of all lagging partitions may take."""


class Reader:
    """Takes samples of these stages; a context manager. Raises Failure where a stage's topics are missing."""

    def __init__(self, settings: Settings, stages: Sequence[str]) -> None:
        self._names = Names(settings.topic_prefix)
        self._config = plain_config(settings, "postroad")
        self._settings = settings
        self._admin = kafka.admin(settings)
        self._onlookers = {stage: kafka.onlooker(settings, self._names.group(stage)) for stage in stages}
        self._consumer = kafka.reader(
            settings, enable_partition_eof=True, fetch_wait_max_ms=100, max_partition_fetch_bytes=1024
        )
        known = self._admin.list_topics(timeout=kafka.TIMEOUT).topics
        prefix = settings.topic_prefix
        bare = {
            name[len(prefix) :]: len(topic.partitions)
            for name, topic in known.items()
            if name.startswith(prefix)
        }
        self.reads: dict[str, list[str]] = {
            stage: [
                *STAGES[stage].reads,
                *sorted(t for t in bare if delay_of(t) and t.startswith(f"{stage}.")),
            ]
            for stage in stages
        }
        wanted = dict.fromkeys(topic for topics in self.reads.values() for topic in topics)
        missing = [topic for topic in wanted if topic not in bare]
        if missing:
            raise kafka.missing(prefix + missing[0])
        self._places = [Place(topic, number) for topic in wanted for number in range(bare[topic])]

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for consumer in (self._consumer, *self._onlookers.values()):
            consumer.close()

    def sample(self, *, heads: bool = True) -> Sample:
        """Return how things are now; without `heads` nothing is known of ages and due times."""
        # The commits come before the ends: between the two a stage may get on, and would be ahead of them.
        committed = {stage: self._committed(stage) for stage in self.reads}
        at = time.time()
        sample = Sample(
            at,
            self._offsets(OffsetSpec.earliest()),  # type: ignore[no-untyped-call]
            self._offsets(OffsetSpec.latest()),  # type: ignore[no-untyped-call]
            self._groups() if heads else {},
            committed,
        )
        if not heads:
            return sample
        return Sample(at, sample.starts, sample.ends, sample.groups, committed, self._heads(sample))

    def _committed(self, stage: str) -> dict[Place, int]:
        asked = [self._full(place) for place in self._places if place.topic in self.reads[stage]]
        return {self._place(p): p.offset for p in kafka.committed(self._onlookers[stage], asked)}

    def _offsets(self, spec: OffsetSpec) -> dict[Place, int]:
        asked = {self._full(place): spec for place in self._places}
        try:
            return {self._place(partition): offset for partition, offset in kafka.offsets(self._admin, asked)}
        except KafkaException:
            # An AdminClient goes on asking with the leader epochs that it knows. After an election each
            # answer is FENCED_LEADER_EPOCH (KIP-320); a new client knows the new epochs.
            self._admin = kafka.admin(self._settings)
            raise

    def _groups(self) -> dict[str, Group]:
        names = {stage: self._names.group(stage) for stage in self.reads}
        found = group_description.describe(self._config, list(names.values()), kafka.TIMEOUT)
        return {stage: self._group(name, found[name]) for stage, name in names.items()}

    def _group(self, name: str, found: group_description.ConsumerGroup) -> Group:
        # Of a group that never was, Kafka says that it is dead.
        state = found.state.lower().replace("_", " ").replace("dead", "none")
        return Group(name, state, [self._member(member) for member in found.members])

    def _member(self, member: group_description.GroupMember) -> Member:
        owned = (TopicPartition(topic, n) for topic, numbers in member.owned.items() for n in numbers)
        return Member(member.id, member.client, member.host, frozenset(map(self._place, owned)))

    def _heads(self, sample: Sample) -> dict[tuple[str, Place], Head]:
        """Read the first record that waits in each partition of each stage.

        Two stages may stand at different places of one partition: those are read in turn.
        """
        left = [(stage, place) for stage, place in self._waiting(sample)]
        heads: dict[tuple[str, Place], Head] = {}
        while left:
            turn: dict[Place, tuple[str, int]] = {}
            for stage, place in left:
                turn.setdefault(place, (stage, sample.position(stage, place)))
            for place, head in self._first({place: offset for place, (_, offset) in turn.items()}).items():
                heads[turn[place][0], place] = head
            left = [(stage, place) for stage, place in left if turn[place][0] != stage]
        return heads

    def _waiting(self, sample: Sample) -> Iterable[tuple[str, Place]]:
        for stage, topics in self.reads.items():
            for place in self._places:
                if place.topic in topics and sample.waiting(stage, place):
                    yield stage, place

    def _first(self, positions: Mapping[Place, int]) -> dict[Place, Head]:
        """Return the first record at or after each position; without one where the partition ends there."""
        assigned = [self._full(place, offset) for place, offset in positions.items()]
        self._consumer.assign(assigned)
        left, found, end = set(positions), dict[Place, Head](), time.monotonic() + _PATIENCE
        while left and time.monotonic() < end:
            for message in self._consumer.consume(len(left), 0.1):
                place = self._place(TopicPartition(message.topic() or "", message.partition() or 0))
                if place not in left:
                    continue
                error = message.error()
                if error is None:
                    found[place] = Head(message.timestamp()[1] / 1000, _due(readable_headers(message)))
                elif error.code() != KafkaError._PARTITION_EOF:
                    continue
                left.discard(place)
                self._consumer.incremental_unassign([self._full(place)])
        self._consumer.unassign()
        return found

    def _full(self, place: Place, offset: int = OFFSET_INVALID) -> TopicPartition:
        return TopicPartition(self._names.topic(place.topic), place.partition, offset)

    def _place(self, partition: TopicPartition) -> Place:
        return Place(partition.topic[len(self._names.prefix) :], partition.partition)


def _due(headers: Headers) -> float | None:
    for name, value in headers:
        if name == "due-at" and (due := parse_number(value)) is not None:
            return due / 1000
    return None
