"""How far the fold is on the topics: what stands before is in the database. Blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from services.api.watch.changes import Place
from services.api.watch.topics import TIMEOUT
from services.common.config import Settings
from services.common.kafka.clients import client_config
from services.common.kafka.topics import EVENT_TOPICS, Names

__all__ = ["Folded"]


class Folded:
    """Asks for the positions that the status service has committed. May be used on several threads.

    The one consumer of the group's name never subscribes and is assigned nothing: to the broker it is no
    member, and the group does not hear of it. An AdminClient would ask the same, but librdkafka 2.16 aborts
    the process where the coordinator's connection is lost while such a request of its waits (its issue 4605).
    """

    def __init__(self, settings: Settings) -> None:
        names = Names(settings.topic_prefix)
        self._config = client_config(settings, f"folded-{settings.replica_name}")
        # The classic protocol's question names no member.
        self._config |= {"group.id": names.group("status"), "group.protocol": "classic"}
        self._config |= {"enable.auto.commit": False}
        self._topics = {name: names.topic(name) for name in EVENT_TOPICS}
        self._names = {full: name for name, full in self._topics.items()}
        self._consumer: Consumer | None = None
        self._closed = False
        self._lock = threading.Lock()

    def positions(self, places: Iterable[Place]) -> dict[Place, int]:
        """Return each partition's next offset to be folded; partitions of which none was yet are left out.

        One thread asks at a time. Raises KafkaException, also after `close`.
        """
        asked = [TopicPartition(self._topics[name], number) for name, number in places]
        with self._lock:
            answers = self._asking().committed(asked, timeout=TIMEOUT)
        for answer in answers:
            if answer.error is not None:
                raise KafkaException(answer.error)
        return {(self._names[at.topic], at.partition): at.offset for at in answers if at.offset >= 0}

    def close(self) -> None:
        """Let go of the connections, after whoever asks now; nobody may ask any more."""
        with self._lock:
            self._closed = True
            if self._consumer is not None:
                self._consumer.close()
                self._consumer = None

    def _asking(self) -> Consumer:
        if self._closed:
            raise KafkaException(KafkaError(KafkaError._DESTROY, "closed"))
        if self._consumer is None:
            self._consumer = Consumer(self._config)
        return self._consumer
