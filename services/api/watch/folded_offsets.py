"""How far the status service has folded the event topics. The database contains all earlier events."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import confluent_kafka
from confluent_kafka import Consumer, KafkaError, KafkaException

from services.api.watch.event_consumer import TIMEOUT
from services.common.config import Settings
from services.common.kafka.clients import client_config
from services.common.kafka.topic_partition import TopicPartition, first_error
from services.common.kafka.topics import EVENT_TOPICS, Names

__all__ = ["FoldedOffsets"]


class FoldedOffsets:
    """Reads the committed offsets of the status service's group. Safe from several threads; blocks.

    Its consumer has the group's id but never subscribes, so it is no member and the group does not rebalance.
    An AdminClient could ask the same. But librdkafka 2.16 aborts the process when it loses the coordinator's
    connection during such a request (librdkafka issue 4605).
    """

    def __init__(self, settings: Settings) -> None:
        names = Names(settings.topic_prefix)
        self._config = client_config(settings, f"folded-{settings.replica_name}")
        # Under the classic protocol the request names no member.
        self._config |= {"group.id": names.group("status"), "group.protocol": "classic"}
        self._config |= {"enable.auto.commit": False}
        self._full_names = {name: names.topic(name) for name in EVENT_TOPICS}
        self._bare_names = {full: name for name, full in self._full_names.items()}
        self._consumer: Consumer | None = None
        self._closed = False
        self._lock = threading.Lock()

    def read(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the next offset to be folded of each partition; omit partitions without a commit.

        Partitions have bare topic names. Raises KafkaException, also after `close`.
        """
        asked = [
            confluent_kafka.TopicPartition(self._full_names[topic], number) for topic, number in partitions
        ]
        with self._lock:
            answers = self._open().committed(asked, timeout=TIMEOUT)
        if error := first_error(answers):
            raise KafkaException(error)
        return {
            TopicPartition(self._bare_names[answer.topic], answer.partition): answer.offset
            for answer in answers
            if answer.offset >= 0
        }

    def close(self) -> None:
        """Close the connections after the present `read`. Later ones fail."""
        with self._lock:
            self._closed = True
            if self._consumer is not None:
                self._consumer.close()
                self._consumer = None

    def _open(self) -> Consumer:
        if self._closed:
            raise KafkaException(KafkaError(KafkaError._DESTROY, "closed"))
        if self._consumer is None:
            self._consumer = Consumer(self._config)
        return self._consumer
