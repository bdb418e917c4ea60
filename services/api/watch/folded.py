"""How far the fold is on the topics: what stands before is in the database. Blocks."""

from __future__ import annotations

import logging
import threading

from confluent_kafka import ConsumerGroupTopicPartitions
from confluent_kafka.admin import AdminClient

from services.api.watch.changes import Place
from services.api.watch.topics import TIMEOUT
from services.common.config import Settings
from services.common.topics import EVENT_TOPICS, Names

__all__ = ["Folded"]


class Folded:
    """Asks for the positions that the status service has committed. May be used on several threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings, names = settings, Names(settings.topic_prefix)
        self._group = names.group("status")
        self._names = {names.topic(name): name for name in EVENT_TOPICS}
        self._admin: AdminClient | None = None
        self._lock = threading.Lock()

    def positions(self) -> dict[Place, int]:
        """Return each partition's next offset to be folded; partitions of which none was yet are left out.

        Raises KafkaException and TimeoutError.
        """
        asked = [ConsumerGroupTopicPartitions(self._group)]
        answer = self._asking().list_consumer_group_offsets(asked, request_timeout=TIMEOUT)[self._group]
        return {
            (self._names[at.topic], at.partition): at.offset
            for at in answer.result(2 * TIMEOUT).topic_partitions
            if at.topic in self._names and at.offset >= 0
        }

    def _asking(self) -> AdminClient:
        with self._lock:
            if self._admin is None:
                bootstrap = self._settings.kafka_bootstrap
                admin = AdminClient(
                    {"bootstrap.servers": bootstrap}, logger=logging.getLogger("postroad.kafka")
                )
                # Asked before it is connected, it may take seconds.
                admin.list_topics(timeout=TIMEOUT)
                self._admin = admin
            return self._admin
