"""Samples of Kafka: what each stage has committed, and what waits for it. Blocks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import confluent_kafka
from confluent_kafka import OFFSET_INVALID, KafkaError
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from services.common.config import Settings
from services.common.kafka import group_request
from services.common.kafka.admin import admin_client
from services.common.kafka.clients import plain_config
from services.common.kafka.headers import readable_headers
from services.common.kafka.records import Headers, parse_number
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import Names, delay_of
from services.common.operations import clients
from services.common.stages import STAGES

__all__ = ["LagSample", "LagSampler", "OldestRecord", "StageGroup", "StageMember"]

_OLDEST_SECONDS = 3.0
"""Seconds that reading the oldest waiting records of all partitions may take."""


class OldestRecord(NamedTuple):
    """The first waiting record of a partition: when it was written and, delayed, is due. Unix seconds."""

    written: float
    due: float | None


@dataclass(frozen=True, slots=True)
class StageMember:
    """A replica as a member of its stage's group, and its assignment."""

    id: str
    client: str
    host: str
    owns: frozenset[TopicPartition]


@dataclass(frozen=True, slots=True)
class StageGroup:
    """A stage's consumer group.

    `state` is Kafka's word in lower case, or `none` for a group that never was.
    """

    name: str
    state: str
    members: Sequence[StageMember]


@dataclass(frozen=True, slots=True)
class LagSample:
    """What Kafka says at one moment (`at`, Unix seconds). Topics have their bare names.

    `committed` has no entry for a partition without a commit.
    """

    at: float
    starts: Mapping[TopicPartition, int]
    ends: Mapping[TopicPartition, int]
    groups: Mapping[str, StageGroup]
    committed: Mapping[str, Mapping[TopicPartition, int]]
    oldest: Mapping[tuple[str, TopicPartition], OldestRecord] = field(default_factory=dict)

    def position(self, stage: str, partition: TopicPartition) -> int:
        """Return where the stage continues: at its commit, or at the first record that still exists."""
        return max(self.committed[stage].get(partition, 0), self.starts[partition])

    def waiting(self, stage: str, partition: TopicPartition) -> int:
        """Return how many records the stage has not committed."""
        return max(0, self.ends[partition] - self.position(stage, partition))


class LagSampler:
    """Takes samples of stages. A context manager. Raises NotFound where a topic of a stage does not exist.

    `reads` are the bare names of each stage's topics, delay topics included.
    """

    def __init__(self, settings: Settings, stages: Sequence[str]) -> None:
        self._names = Names(settings.topic_prefix)
        self._config = plain_config(settings, "postroad")
        self._settings = settings
        self._observers = {
            stage: clients.group_observer(settings, self._names.group(stage)) for stage in stages
        }
        self._consumer = clients.ungrouped_consumer(
            settings, enable_partition_eof=True, fetch_wait_max_ms=100, max_partition_fetch_bytes=1024
        )
        known = admin_client(settings).list_topics(timeout=clients.TIMEOUT).topics
        prefix = settings.topic_prefix
        sizes = {
            name[len(prefix) :]: len(topic.partitions)
            for name, topic in known.items()
            if name.startswith(prefix)
        }
        self.reads: dict[str, list[str]] = {
            stage: [
                *STAGES[stage].reads,
                *sorted(t for t in sizes if delay_of(t) and t.startswith(f"{stage}.")),
            ]
            for stage in stages
        }
        wanted = dict.fromkeys(topic for topics in self.reads.values() for topic in topics)
        missing = [topic for topic in wanted if topic not in sizes]
        if missing:
            raise clients.missing_topic(prefix + missing[0])
        self._partitions = [
            TopicPartition(topic, number) for topic in wanted for number in range(sizes[topic])
        ]

    def __enter__(self) -> LagSampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for consumer in (self._consumer, *self._observers.values()):
            consumer.close()

    def sample(self, *, offsets_only: bool = False) -> LagSample:
        """Return a sample. With `offsets_only` it has no groups and no oldest records."""
        # The commits come before the ends. In the other order a stage may commit between the two, beyond the
        # end.
        committed = {stage: self._committed(stage) for stage in self.reads}
        at = time.time()
        sample = LagSample(
            at,
            self._offsets(OffsetSpec.earliest()),  # type: ignore[no-untyped-call]
            self._offsets(OffsetSpec.latest()),  # type: ignore[no-untyped-call]
            {} if offsets_only else self._groups(),
            committed,
        )
        if offsets_only:
            return sample
        return LagSample(at, sample.starts, sample.ends, sample.groups, committed, self._oldest(sample))

    def _committed(self, stage: str) -> dict[TopicPartition, int]:
        asked = [self._full(one) for one in self._partitions if one.topic in self.reads[stage]]
        found = clients.committed_offsets(self._observers[stage], asked)
        return {self._bare(one): one.offset for one in found}

    def _offsets(self, spec: OffsetSpec) -> dict[TopicPartition, int]:
        asked = {self._full(partition): spec for partition in self._partitions}
        found = clients.list_offsets(self._settings, asked)
        return {self._bare(partition): offset for partition, offset in found}

    def _groups(self) -> dict[str, StageGroup]:
        names = {stage: self._names.group(stage) for stage in self.reads}
        found = group_request.describe(self._config, list(names.values()), clients.TIMEOUT)
        return {stage: self._group(name, found[name]) for stage, name in names.items()}

    def _group(self, name: str, found: group_request.ConsumerGroup) -> StageGroup:
        # Kafka calls a group dead that never was.
        state = found.state.lower().replace("_", " ").replace("dead", "none")
        return StageGroup(name, state, [self._member(member) for member in found.members])

    def _member(self, member: group_request.GroupMember) -> StageMember:
        prefix = len(self._names.prefix)
        owned = (
            TopicPartition(topic[prefix:], number)
            for topic, numbers in member.owned.items()
            for number in numbers
        )
        return StageMember(member.id, member.client, member.host, frozenset(owned))

    def _oldest(self, sample: LagSample) -> dict[tuple[str, TopicPartition], OldestRecord]:
        """Read the first record that waits for each stage in each partition.

        A consumer has one position in a partition. So where several stages read a partition, each has its
        turn.
        """
        left = list(self._waiting(sample))
        oldest: dict[tuple[str, TopicPartition], OldestRecord] = {}
        while left:
            turn: dict[TopicPartition, tuple[str, int]] = {}
            for stage, partition in left:
                turn.setdefault(partition, (stage, sample.position(stage, partition)))
            positions = {partition: offset for partition, (_, offset) in turn.items()}
            for partition, record in self._read_first(positions).items():
                oldest[turn[partition][0], partition] = record
            left = [(stage, partition) for stage, partition in left if turn[partition][0] != stage]
        return oldest

    def _waiting(self, sample: LagSample) -> Iterable[tuple[str, TopicPartition]]:
        for stage, topics in self.reads.items():
            for partition in self._partitions:
                if partition.topic in topics and sample.waiting(stage, partition):
                    yield stage, partition

    def _read_first(self, positions: Mapping[TopicPartition, int]) -> dict[TopicPartition, OldestRecord]:
        """Return the first record at or after each position, without partitions that end there."""
        self._consumer.assign([self._full(partition, offset) for partition, offset in positions.items()])
        left, found = set(positions), dict[TopicPartition, OldestRecord]()
        deadline = time.monotonic() + _OLDEST_SECONDS
        while left and time.monotonic() < deadline:
            for message in self._consumer.consume(len(left), 0.1):
                partition = self._bare(
                    confluent_kafka.TopicPartition(message.topic() or "", message.partition() or 0)
                )
                if partition not in left:
                    continue
                error = message.error()
                if error is None:
                    written = message.timestamp()[1] / 1000
                    found[partition] = OldestRecord(written, _due(readable_headers(message)))
                elif error.code() != KafkaError._PARTITION_EOF:
                    continue
                left.discard(partition)
                self._consumer.incremental_unassign([self._full(partition)])
        self._consumer.unassign()
        return found

    def _full(
        self, partition: TopicPartition, offset: int = OFFSET_INVALID
    ) -> confluent_kafka.TopicPartition:
        topic = self._names.topic(partition.topic)
        return confluent_kafka.TopicPartition(topic, partition.partition, offset)

    def _bare(self, partition: confluent_kafka.TopicPartition) -> TopicPartition:
        return TopicPartition(partition.topic[len(self._names.prefix) :], partition.partition)


def _due(headers: Headers) -> float | None:
    for name, value in headers:
        if name == "due-at" and (due := parse_number(value)) is not None:
            return due / 1000
    return None
