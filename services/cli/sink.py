"""Producing records of a command. Blocks."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from services.cli.kafka import SILENT, TIMEOUT, missing
from services.common.config import Settings
from services.common.stage.clients import producer_config
from services.common.stage.headers import Headers

__all__ = ["LARGEST", "Sink"]

LARGEST = 60 << 20
"""Bytes that a record may have. The broker counts them compressed, and may refuse fewer."""

# Longer than the producer tries (seconds).
_FLUSH = 40.0


class Sink:
    """One idempotent producer. `put`, then `flush`: only then is anything on the topic for sure."""

    def __init__(self, settings: Settings, client_id: str = "postroad.cli") -> None:
        # Records that are read one by one and produced at a rate need no batches of their own making.
        self._producer = Producer(
            producer_config(settings, client_id)
            # What another producer has compressed may be larger than what a stage writes.
            | {"logger": SILENT, "linger.ms": 5, "message.max.bytes": LARGEST}
        )
        self._failed: KafkaError | None = None
        self._there: set[str] = set()

    def put(
        self, topic: str, key: bytes | None, value: bytes | None, headers: Headers, partition: int = -1
    ) -> None:
        """Produce a record to a topic (full name), to the key's partition unless one is named.

        Waits while the client's queue is full. Raises Failure where the topic is not there, and
        `confluent_kafka.KafkaException` where the cluster cannot be asked.
        """
        if topic not in self._there:
            self._look(topic)
        while True:
            try:
                self._producer.produce(
                    topic,
                    value,
                    key,
                    partition=partition,
                    headers=headers,  # type: ignore[arg-type]
                    on_delivery=self._delivered,
                )
            except BufferError:
                self._producer.poll(0.1)
            else:
                self._producer.poll(0)
                return

    def flush(self) -> None:
        """Return once all is acked; raises `confluent_kafka.KafkaException` where it cannot be."""
        left = self._producer.flush(_FLUSH)
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise KafkaException(failed)
        if left:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"{left} records were not acked"))

    def _look(self, topic: str) -> None:
        # The producer would look for it until it gives the record up, and then speak of time alone.
        error = self._producer.list_topics(topic, timeout=TIMEOUT).topics[topic].error
        if error is not None:
            if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise missing(topic)
            raise KafkaException(error)
        self._there.add(topic)

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        # Only what a broker has written has an offset; see Publisher.
        if error is None and message.offset() is None:
            error = KafkaError(KafkaError._BAD_MSG, "acked without an offset, perhaps never written")
        self._failed = self._failed or error
