"""Several topics read from their start to where they end, and on from there. Blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]

from services.cli.kafka import TIMEOUT, admin, missing, offsets, reader
from services.common.config import Settings
from services.common.kafka.topics import MAX_RECORD_BYTES

__all__ = ["At", "Log"]


class At(NamedTuple):
    """A partition of a topic (full name)."""

    topic: str
    partition: int


class Log:
    """Reads `topics` (full names) without a group. `next` is how far it has come, by partition.

    `start` is where each partition began when it was first looked at. Where nothing comes for `silence`
    seconds, the cluster does not answer. Raises `confluent_kafka.KafkaException`, and Failure where a topic
    is not there.
    """

    def __init__(self, settings: Settings, topics: Sequence[str]) -> None:
        self._admin = admin(settings)
        self._consumer: Consumer = reader(
            settings,
            enable_partition_eof=True,
            queued_max_messages_kbytes=16 << 10,
            fetch_wait_max_ms=20,
            # Small portions: topics of large records and of small ones are read at about one pace.
            max_partition_fetch_bytes=64 << 10,
            receive_message_max_bytes=MAX_RECORD_BYTES + (64 << 20),
        )
        self._partitions = [TopicPartition(name, number) for name in topics for number in self._numbers(name)]
        self.start = self._offsets(OffsetSpec.earliest())  # type: ignore[no-untyped-call]
        self.next = dict(self.start)
        self.first_ms: dict[At, int] = {}
        self.silence = 30.0

    def close(self) -> None:
        """Let go of the connections."""
        self._consumer.close()

    def ends(self) -> dict[At, int]:
        """Return where each partition ends now: the offset that its next record will have."""
        return self._offsets(OffsetSpec.latest())  # type: ignore[no-untyped-call]

    def since(self, time_ms: int) -> dict[At, int]:
        """Return each partition's first record of that time (Unix ms) or later, its end where none is."""
        found = self._offsets(OffsetSpec.for_timestamp(time_ms))
        ends = self.ends()
        return {at: offset if offset >= 0 else ends[at] for at, offset in found.items()}

    def left(self, ends: Mapping[At, int]) -> int:
        """Return how many offsets there are between `next` and `ends`."""
        return sum(max(0, end - self.next[at]) for at, end in ends.items())

    def read(self, ends: Mapping[At, int], limit: int) -> Iterator[list[Message]]:
        """Yield what lies between `next` and `ends`, each partition in order, at most `limit` at a time.

        `first_ms` gets the time of each partition's first record, Unix milliseconds.
        """
        open_ = {at for at, end in ends.items() if end > self.next[at]}
        self._consumer.assign([TopicPartition(*at, self.next[at]) for at in open_])
        heard = time.monotonic()
        while open_:
            batch: list[Message] = []
            for message in self._consumer.consume(limit, 0.02):
                at = At(message.topic() or "", message.partition() or 0)
                offset = message.offset() or 0
                error = message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
                # Offsets may be missing, those before the end too.
                if error is None and offset < ends[at]:
                    if at not in self.first_ms:
                        self.first_ms[at] = message.timestamp()[1]
                    batch.append(message)
                    self.next[at] = offset + 1
                if offset + (error is None) >= ends[at]:
                    self.next[at] = max(self.next[at], ends[at])
                    open_.discard(at)
                heard = time.monotonic()
            if batch:
                yield batch
                # What was done with it may have taken as long as it liked.
                heard = time.monotonic()
            if time.monotonic() - heard > self.silence:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "nothing came of the topics"))
        self._consumer.unassign()

    def _numbers(self, name: str) -> list[int]:
        found = self._consumer.list_topics(name, timeout=TIMEOUT).topics[name]
        if found.error is not None:
            if found.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise missing(name)
            raise KafkaException(found.error)
        return sorted(found.partitions)

    def _offsets(self, which: OffsetSpec) -> dict[At, int]:
        asked = {TopicPartition(p.topic, p.partition): which for p in self._partitions}
        return {At(p.topic, p.partition): offset for p, offset in offsets(self._admin, asked)}
