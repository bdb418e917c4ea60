"""The event topics as a Watch reads them: by assignment, in no group, without a commit. Blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from services.api.watch.changes import Change, Place, change
from services.common.config import Settings
from services.common.events import Undecodable
from services.common.kafka.clients import consumer_config
from services.common.kafka.headers import REPLAY_ID
from services.common.kafka.leaders import retry_while_leaderless
from services.common.kafka.records import readable_headers
from services.common.kafka.topics import EVENT_TOPICS, Names

__all__ = ["TIMEOUT", "Topics"]

TIMEOUT = 5.0
"""Seconds that the cluster may take for an answer."""


class Topics:
    """A consumer of the event topics, for one thread at a time; `kbytes` bounds what it fetches ahead.

    `ends`: among the messages it says where a partition has no more, as the error _PARTITION_EOF.

    Raises `confluent_kafka.KafkaException` where the cluster does not answer.
    """

    def __init__(
        self, settings: Settings, on_error: Callable[[KafkaError], None], kbytes: int, *, ends: bool
    ) -> None:
        self._prefix = settings.topic_prefix
        self._names = {Names(self._prefix).topic(name): name for name in EVENT_TOPICS}
        config = consumer_config(settings, "watch", f"watch-{settings.replica_name}", gather=False)
        config |= {
            "auto.offset.reset": "error",
            "enable.partition.eof": ends,
            "error_cb": on_error,
            "queued.max.messages.kbytes": kbytes,
            "fetch.wait.max.ms": 50,
        }
        self._config = config
        self.consumer = Consumer(config)

    def close(self) -> None:
        """Let go of the connections; it may take a moment."""
        self.consumer.close()

    def places(self) -> list[Place]:
        """Return the partitions that there are."""
        known = self.consumer.list_topics(timeout=TIMEOUT).topics
        there = ((name, known[full]) for full, name in self._names.items() if full in known)
        return [(name, number) for name, topic in there for number in topic.partitions]

    def starts(self, places: Iterable[Place]) -> dict[Place, int]:
        """Return the first offset of each partition that is still kept."""
        return self._offsets(places, OFFSET_BEGINNING)

    def ends(self, places: Iterable[Place]) -> dict[Place, int]:
        """Return the offset that each partition's next record will have."""
        return self._offsets(places, OFFSET_END)

    def at(self, place: Place, offset: int = OFFSET_INVALID) -> TopicPartition:
        """Return what the consumer calls this place."""
        return TopicPartition(self._prefix + place[0], place[1], offset)

    def again(self, place: Place, offset: int) -> None:
        """Read an assigned partition from this offset on, after it could not be read."""
        self.consumer.incremental_unassign([self.at(place)])
        self.consumer.incremental_assign([self.at(place, offset)])

    def fetch(self, most: int, wait: float) -> list[Message]:
        """Return what there is, at most so much, after at most `wait` seconds."""
        # consume() would wait all the time through unless that many came.
        first = self.consumer.poll(wait)
        return [] if first is None else [first, *self.consumer.consume(most - 1, 0)]

    def place(self, message: Message) -> Place:
        """Return where a message stands."""
        return self._names[message.topic() or ""], message.partition() or 0

    def change(self, message: Message) -> Change | None:
        """Return what a record says; None where it is no event: a stage puts it to its dead letters."""
        replayed = any(header[0] == REPLAY_ID for header in readable_headers(message))
        try:
            return change(
                message.value(), replayed, self.place(message), message.offset() or 0, message.timestamp()[1]
            )
        except Undecodable:
            return None

    def _offsets(self, places: Iterable[Place], which: int) -> dict[Place, int]:
        asked = [self.at(place, which) for place in places]
        if not asked:
            return {}
        return retry_while_leaderless(TIMEOUT)(self._answered, asked)

    def _answered(self, asked: list[TopicPartition]) -> dict[Place, int]:
        # To Kafka its first and its last offset are times too. An AdminClient that was just made took up to
        # three seconds for this.
        answers = self.consumer.offsets_for_times(asked, timeout=TIMEOUT)
        for answer in answers:
            if answer.error is not None:
                raise KafkaException(answer.error)
        return {(self._names[answer.topic], answer.partition): answer.offset for answer in answers}
