"""The event topics as a Watch reads them: by assignment, in no group, without a commit. Blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, Message, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from services.api.watch.changes import Change, Place, change
from services.common.config import Settings
from services.common.events import Undecodable
from services.common.stage.clients import consumer_config
from services.common.topics import EVENT_TOPICS, Names

__all__ = ["TIMEOUT", "Topics"]

TIMEOUT = 5.0
"""Seconds that the cluster may take for an answer."""
_REPLAY_ID = "replay-id"


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
        self._admin: AdminClient | None = None

    def close(self) -> None:
        """Let go of the connections."""
        self.consumer.close()

    def places(self) -> list[Place]:
        """Return the partitions that there are."""
        known = self.consumer.list_topics(timeout=TIMEOUT).topics
        there = ((name, known[full]) for full, name in self._names.items() if full in known)
        return [(name, number) for name, topic in there for number in topic.partitions]

    def starts(self, places: Iterable[Place]) -> dict[Place, int]:
        """Return the first offset of each partition that is still kept."""
        return self._offsets(places, OffsetSpec.earliest())  # type: ignore[no-untyped-call]

    def ends(self, places: Iterable[Place]) -> dict[Place, int]:
        """Return the offset that each partition's next record will have."""
        return self._offsets(places, OffsetSpec.latest())  # type: ignore[no-untyped-call]

    def folded(self, places: Iterable[Place]) -> dict[Place, int]:
        """Return how far the status service is: what stands before these offsets is in the database."""
        group = Names(self._prefix).group("status")
        asked = [ConsumerGroupTopicPartitions(group)]
        answer = self._asking().list_consumer_group_offsets(asked, request_timeout=TIMEOUT)[group]
        committed = {
            (at.topic, at.partition): at.offset for at in answer.result(2 * TIMEOUT).topic_partitions
        }
        # A partition of which nothing was committed is folded from its start.
        return {
            (name, number): max(start, committed.get((self._prefix + name, number), 0))
            for (name, number), start in self.starts(places).items()
        }

    def at(self, place: Place, offset: int = -1001) -> TopicPartition:
        """Return what the consumer calls this place."""
        return TopicPartition(self._prefix + place[0], place[1], offset)

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
        replayed = any(header[0] == _REPLAY_ID for header in message.headers() or ())
        try:
            return change(
                message.value(), replayed, self.place(message), message.offset() or 0, message.timestamp()[1]
            )
        except Undecodable:
            return None

    def _asking(self) -> AdminClient:
        if self._admin is None:
            kept = ("bootstrap.servers", "client.id", "logger", "socket.connection.setup.timeout.ms")
            self._admin = AdminClient({name: self._config[name] for name in kept})
        return self._admin

    def _offsets(self, places: Iterable[Place], spec: OffsetSpec) -> dict[Place, int]:
        asked = {self.at(place): spec for place in places}
        if not asked:
            return {}
        answers = self._asking().list_offsets(asked, request_timeout=TIMEOUT)
        return {
            (self._names[at.topic], at.partition): answer.result(2 * TIMEOUT).offset
            for at, answer in answers.items()
        }
