"""Produces records and tells which ones Kafka refuses. Blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from services.common.config import Settings
from services.common.kafka.admin import SILENT_LOGGER
from services.common.kafka.clients import producer_config
from services.common.kafka.publisher import is_permanent, produce_error
from services.common.kafka.records import Headers
from services.common.operations.clients import TIMEOUT, missing_topic

__all__ = ["MAX_RECORD_SIZE", "OnRefusal", "RecordProducer"]

OnRefusal = Callable[[KafkaError], None]
"""Takes the error for which Kafka refuses a record."""

MAX_RECORD_SIZE = 60 << 20
"""The most bytes of a record. The broker counts compressed bytes, and may allow fewer."""

# Longer than the producer retries (seconds).
_FLUSH = 40.0
# A larger record shares no batch with others.
_BATCH_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class _ProducedRecord:
    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    partition: int
    on_refusal: OnRefusal | None

    @property
    def shares_batch(self) -> bool:
        return len(self.key or b"") + len(self.value or b"") <= _BATCH_BYTES


class RecordProducer:
    """One idempotent producer: call `put` for each record, then `flush`. Only then are the records acked."""

    def __init__(self, settings: Settings, client_id: str = "postroad.cli") -> None:
        # Records come one by one and at a rate, so that a long linger would only delay them.
        self._producer = Producer(
            producer_config(settings, client_id)
            # Another producer's compressed record may be larger than what a stage writes.
            | {
                "logger": SILENT_LOGGER,
                "linger.ms": 5,
                "message.max.bytes": MAX_RECORD_SIZE,
                "batch.size": _BATCH_BYTES,
            }
        )
        self._error: KafkaError | None = None
        self._retry_alone: list[_ProducedRecord] = []
        self._known_topics: set[str] = set()

    def put(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        *,
        partition: int = -1,
        on_refusal: OnRefusal | None = None,
    ) -> None:
        """Produce a record to a topic (full name), to its key's partition unless `partition` names one.

        Blocks while the client's queue is full. If the client or the broker refuses this record for good, as
        for its size, `on_refusal` is called before `flush` returns. Without `on_refusal` the refusal is
        raised here or in `flush`. Raises NotFound where the topic does not exist, and
        `confluent_kafka.KafkaException` where the cluster does not answer.
        """
        if topic not in self._known_topics:
            self._check_topic(topic)
        self._produce(_ProducedRecord(topic, key, value, headers, partition, on_refusal))

    def flush(self) -> None:
        """Return once all records are acked or refused. Raises `confluent_kafka.KafkaException`."""
        self._await_acks()
        # A broker refuses a whole batch for the sake of one record. Alone, each record gets its own answer.
        again, self._retry_alone = self._retry_alone, []
        for record in again:
            self._produce(record, alone=True)
            self._await_acks()

    def _produce(self, record: _ProducedRecord, alone: bool = False) -> None:
        while True:
            try:
                self._producer.produce(
                    record.topic,
                    record.value,
                    record.key,
                    partition=record.partition,
                    headers=record.headers,  # type: ignore[arg-type]
                    on_delivery=partial(self._on_delivery, record, alone),
                )
            except BufferError:
                self._producer.poll(0.1)
                continue
            except Exception as error:
                why = produce_error(error)
                if record.on_refusal is None or not is_permanent(why):
                    raise
                record.on_refusal(why)
            self._producer.poll(0)
            return

    def _await_acks(self) -> None:
        left = self._producer.flush(_FLUSH)
        if self._error is not None:
            error, self._error = self._error, None
            raise KafkaException(error)
        if left:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"{left} records were not acked"))

    def _check_topic(self, topic: str) -> None:
        # Without this, the producer would look for the topic until it gives up, and report a timeout.
        error = self._producer.list_topics(topic, timeout=TIMEOUT).topics[topic].error
        if error is not None:
            if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise missing_topic(topic)
            raise KafkaException(error)
        self._known_topics.add(topic)

    def _on_delivery(
        self, record: _ProducedRecord, alone: bool, error: KafkaError | None, message: Message
    ) -> None:
        # Only a record that a broker wrote has an offset (see Publisher).
        if error is None and message.offset() is None:
            error = KafkaError(KafkaError._BAD_MSG, "acked without an offset, perhaps never written")
        if error is None:
            return
        for_good = is_permanent(error) or error.code() == KafkaError._INVALID_DIFFERENT_RECORD
        if for_good and record.shares_batch and not alone:
            self._retry_alone.append(record)
        elif for_good and record.on_refusal is not None:
            record.on_refusal(error)
        else:
            self._error = self._error or error
