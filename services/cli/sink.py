"""Producing records of a command. Blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from services.cli.kafka import SILENT, TIMEOUT, missing
from services.common.config import Settings
from services.common.kafka.clients import producer_config
from services.common.kafka.publisher import is_permanent, produce_error
from services.common.kafka.records import Headers

__all__ = ["LARGEST", "Refused", "Sink"]

Refused = Callable[[KafkaError], None]
"""Told why a record cannot be produced."""

LARGEST = 60 << 20
"""Bytes that a record may have. The broker counts them compressed, and may refuse fewer."""

# Longer than the producer tries (seconds).
_FLUSH = 40.0
# A larger record shares a batch with no other.
_BATCH_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class _Item:
    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    partition: int
    refused: Refused | None

    @property
    def shares(self) -> bool:
        return len(self.key or b"") + len(self.value or b"") <= _BATCH_BYTES


class Sink:
    """One idempotent producer. `put`, then `flush`: only then is anything on the topic for sure."""

    def __init__(self, settings: Settings, client_id: str = "postroad.cli") -> None:
        # Records that are read one by one and produced at a rate need no batches of their own making.
        self._producer = Producer(
            producer_config(settings, client_id)
            # What another producer has compressed may be larger than what a stage writes.
            | {"logger": SILENT, "linger.ms": 5, "message.max.bytes": LARGEST, "batch.size": _BATCH_BYTES}
        )
        self._failed: KafkaError | None = None
        self._again: list[_Item] = []
        self._there: set[str] = set()

    def put(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        *,
        partition: int = -1,
        refused: Refused | None = None,
    ) -> None:
        """Produce a record to a topic (full name), to the key's partition unless one is named.

        `refused` is called, before `flush` returns, if the client or the broker would refuse this record each
        time (it is too large, say). Without `refused` that raises, here or in `flush`.

        Waits while the client's queue is full. Raises Failure where the topic is not there, and
        `confluent_kafka.KafkaException` where the cluster cannot be asked.
        """
        if topic not in self._there:
            self._look(topic)
        self._produce(_Item(topic, key, value, headers, partition, refused))

    def flush(self) -> None:
        """Return once all is acked or refused; raises `confluent_kafka.KafkaException` where it cannot be."""
        self._wait()
        # A broker refuses a batch whole, for the sake of one of its records: alone each gets its own answer.
        again, self._again = self._again, []
        for item in again:
            self._produce(item, alone=True)
            self._wait()

    def _produce(self, item: _Item, alone: bool = False) -> None:
        while True:
            try:
                self._producer.produce(
                    item.topic,
                    item.value,
                    item.key,
                    partition=item.partition,
                    headers=item.headers,  # type: ignore[arg-type]
                    on_delivery=partial(self._delivered, item, alone),
                )
            except BufferError:
                self._producer.poll(0.1)
                continue
            except Exception as error:
                why = produce_error(error)
                if item.refused is None or not is_permanent(why):
                    raise
                item.refused(why)
            self._producer.poll(0)
            return

    def _wait(self) -> None:
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

    def _delivered(self, item: _Item, alone: bool, error: KafkaError | None, message: Message) -> None:
        # Only what a broker has written has an offset; see Publisher.
        if error is None and message.offset() is None:
            error = KafkaError(KafkaError._BAD_MSG, "acked without an offset, perhaps never written")
        if error is None:
            return
        for_good = is_permanent(error) or error.code() == KafkaError._INVALID_DIFFERENT_RECORD
        if for_good and item.shares and not alone:
            self._again.append(item)
        elif for_good and item.refused is not None:
            item.refused(error)
        else:
            self._failed = self._failed or error
