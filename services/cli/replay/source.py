"""Reading a topic from here to there, without a group. Blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from services.cli.kafka import TIMEOUT, reader
from services.cli.replay.records import Read
from services.cli.replay.span import Point
from services.common.config import Settings
from services.common.topics import Names

__all__ = ["Span", "batches", "spans"]

_BATCH_BYTES = 8 << 20
# Nothing at all for so long means that the cluster does not answer (seconds).
_SILENCE = 30.0


class Span(NamedTuple):
    """What is still to be read of a partition: from `next` up to, not including, `end`."""

    next: int
    end: int

    @property
    def left(self) -> int:
        """How many offsets that are."""
        return max(0, self.end - self.next)


def spans(settings: Settings, topic: str, start: Point, end: Point) -> dict[int, Span]:
    """Return what lies between two points of a topic (bare name) as it stands now, by partition.

    Raises `confluent_kafka.KafkaException`; the topic not being there is one.
    """
    name = Names(settings.topic_prefix).topic(topic)
    consumer = reader(settings)
    try:
        found = consumer.list_topics(name, timeout=TIMEOUT).topics[name]
        if found.error is not None:
            raise KafkaException(found.error)
        partitions = sorted(found.partitions)
        ends = {
            number: consumer.get_watermark_offsets(TopicPartition(name, number), timeout=TIMEOUT)
            for number in partitions
        }
        first = _offsets(consumer, name, ends, start)
        last = _offsets(consumer, name, ends, end)
    finally:
        consumer.close()
    return {number: Span(first[number], max(first[number], last[number])) for number in partitions}


def _offsets(
    consumer: Consumer, name: str, ends: Mapping[int, tuple[int, int]], point: Point
) -> dict[int, int]:
    if point == "start":
        return {number: low for number, (low, _) in ends.items()}
    if point == "end":
        return {number: high for number, (_, high) in ends.items()}
    if isinstance(point, int):
        return {number: min(max(low, point), high) for number, (low, high) in ends.items()}
    at = round(point.timestamp() * 1000)
    asked = [TopicPartition(name, number, at) for number in ends]
    # A partition without a record from that time on answers -1: its end.
    answers = consumer.offsets_for_times(asked, timeout=TIMEOUT)
    return {a.partition: min(a.offset if a.offset >= 0 else 1 << 62, ends[a.partition][1]) for a in answers}


def batches(settings: Settings, topic: str, todo: Mapping[int, Span], limit: int) -> Iterator[list[Read]]:
    """Yield the records of these spans, each partition in order, at most `limit` and some megabytes at once.

    An empty batch means that nothing came for a moment. Offsets may be missing from a partition. Raises
    `confluent_kafka.KafkaException`.
    """
    name = Names(settings.topic_prefix).topic(topic)
    left = {number: span for number, span in todo.items() if span.left}
    if not left:
        return
    consumer = reader(settings, enable_partition_eof=True, queued_max_messages_kbytes=16 << 10)
    try:
        consumer.assign([TopicPartition(name, number, span.next) for number, span in left.items()])
        heard = time.monotonic()
        while left:
            batch: list[Read] = []
            size = 0
            while left and len(batch) < limit and size < _BATCH_BYTES:
                message = consumer.poll(0.0 if batch else 0.25)
                if message is None:
                    break
                heard = time.monotonic()
                record = _read(message, topic, left)
                if record is not None:
                    batch.append(record)
                    size += len(record.value or b"")
            if time.monotonic() - heard > _SILENCE:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"nothing came of {name}"))
            yield batch
            # What the caller did with it may take as long as it likes.
            heard = max(heard, time.monotonic()) if batch else heard
    finally:
        consumer.close()


def _read(message: Any, topic: str, left: dict[int, Span]) -> Read | None:
    """Return the message if it is one of those that are left, and strike off what is finished."""
    number, error = message.partition(), message.error()
    if error is not None:
        if error.code() == KafkaError._PARTITION_EOF:
            # Its last offsets may be missing.
            left.pop(number, None)
            return None
        raise KafkaException(error)
    span = left.get(number)
    if span is None:
        return None
    offset = message.offset()
    if offset + 1 >= span.end:
        del left[number]
    if offset >= span.end:
        return None
    return Read(topic, number, offset, message.key(), message.value(), message.headers())
