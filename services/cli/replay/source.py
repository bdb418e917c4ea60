"""What of a topic is to be read, and reading it. Blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from services.cli.replay.records import Read
from services.cli.replay.span import Point
from services.cli.topic_log import At, Log
from services.common.config import Settings
from services.common.kafka.records import readable_headers
from services.common.kafka.topics import Names

__all__ = ["Span", "batches", "spans"]


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

    Raises `confluent_kafka.KafkaException`, and Failure where the topic is not there.
    """
    log = Log(settings, [Names(settings.topic_prefix).topic(topic)])
    try:
        ends = log.ends()
        first, last = _offsets(log, ends, start), _offsets(log, ends, end)
    finally:
        log.close()
    return {at.partition: Span(first[at], max(first[at], last[at])) for at in sorted(ends)}


def _offsets(log: Log, ends: Mapping[At, int], point: Point) -> Mapping[At, int]:
    if point == "start":
        return log.start
    if point == "end":
        return ends
    if isinstance(point, int):
        return {at: min(max(log.start[at], point), end) for at, end in ends.items()}
    # Where nothing is that late it is the end; more may have come since `ends`.
    found = log.since(round(point.timestamp() * 1000))
    return {at: min(found[at], end) for at, end in ends.items()}


def batches(settings: Settings, topic: str, todo: Mapping[int, Span], limit: int) -> Iterator[list[Read]]:
    """Yield the records of these spans, each partition in order, at most `limit` at once.

    Offsets may be missing from a partition. Raises `confluent_kafka.KafkaException`.
    """
    name = Names(settings.topic_prefix).topic(topic)
    log = Log(settings, [name])
    try:
        log.next.update({At(name, number): span.next for number, span in todo.items()})
        ends = {At(name, number): span.end for number, span in todo.items() if span.left}
        for messages in log.read(ends, limit):
            yield [_read(topic, message) for message in messages]
    finally:
        log.close()


def _read(topic: str, message: Any) -> Read:
    headers = readable_headers(message)
    return Read(topic, message.partition(), message.offset(), message.key(), message.value(), headers)
