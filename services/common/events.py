"""Turns events into records and back.

Headers follow CloudEvents' Kafka binding in binary mode (CloudEvents 1.0, Kafka Protocol Binding
section 3.2). `ce_id` is made from what the event says, not random: the same event published twice
(after a crash, by a replay) is recognised as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message

from postroad.v1 import events_pb2 as pb
from services.common.kafka import topics
from services.common.kafka.records import Headers, OutgoingRecord

__all__ = [
    "CREATED_KEY",
    "DECODERS",
    "EncodedEvent",
    "Event",
    "Undecodable",
    "encode",
    "event_key",
    "task_id",
]

Event = (
    pb.TaskCreated | pb.MxOk | pb.MxFailed | pb.MailSent | pb.MailDeferred | pb.MailFailed | pb.TaskCancelled
)

_TOPICS: Mapping[type[Message], str] = {
    pb.TaskCreated: topics.TASK_CREATED,
    pb.MxOk: topics.MX_OK,
    pb.MxFailed: topics.MX_FAILED,
    pb.MailSent: topics.MAIL_SENT,
    pb.MailDeferred: topics.MAIL_DEFERRED,
    pb.MailFailed: topics.MAIL_FAILED,
    pb.TaskCancelled: topics.TASK_CANCELLED,
}


_WITH_TASK = frozenset({pb.TaskCreated, pb.MxOk})
_WITH_ATTEMPT = frozenset(kind for kind in _TOPICS if "attempt" in kind.DESCRIPTOR.fields_by_name)


class EncodedEvent(NamedTuple):
    """An event whose bytes are known without its message: its topic, task id, `event_key`, time and bytes."""

    topic: str
    task_id: bytes
    key: str
    at_us: int
    value: bytes


class Undecodable(ValueError):
    """A record that is no event of its topic; the text says why."""


def task_id(event: Event) -> bytes:
    """Return the 16 bytes of the event's task id."""
    return event.task.id if type(event) in _WITH_TASK else event.id  # type: ignore[union-attr]


def event_key(event: Event) -> str:
    """Return what tells this event from all others of its task: topic, epoch, stage and attempt."""
    kind = type(event)
    topic = _TOPICS[kind]
    attempt = event.attempt if kind in _WITH_ATTEMPT else 0  # type: ignore[union-attr]
    if kind is pb.MailDeferred:
        doubt = f":in_doubt.{event.takeover}" if event.in_doubt else ""  # type: ignore[union-attr]
        return f"{topic}:{event.epoch}:{event.stage}.{attempt}{doubt}"  # type: ignore[union-attr]
    return f"{topic}:{event.epoch}:{attempt}"


CREATED_KEY = event_key(pb.TaskCreated())
"""The key of every task's first event."""

_SPEC_VERSION = ("ce_specversion", b"1.0")
_CONTENT_TYPE = ("content-type", b"application/protobuf")


def encode(event: Event | EncodedEvent, source: str, traceparent: bytes | None = None) -> OutgoingRecord:
    """Return the record that carries `event`.

    `source` is the service that publishes it (`ce_source`); `traceparent` the W3C trace context to carry on.
    """
    if isinstance(event, EncodedEvent):
        topic, id_, key, at_us, value = event
    else:
        topic, id_, key, at_us = _TOPICS[type(event)], task_id(event), event_key(event), event.at_us
        # Maps in the order of their keys: the same event has the same bytes whoever publishes it.
        value = event.SerializeToString(deterministic=True)
    kind, publisher = _constant_headers(topic, source)
    headers: Headers = [
        _SPEC_VERSION,
        ("ce_id", f"{id_.hex()}:{key}".encode()),
        kind,
        publisher,
        ("ce_time", _time(at_us)),
        _CONTENT_TYPE,
    ]
    if traceparent is not None:
        headers.append(("traceparent", traceparent))
    return OutgoingRecord(topic, id_, value, headers)


@cache
def _constant_headers(topic: str, source: str) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    return ("ce_type", f"postroad.v1.{topic}".encode()), ("ce_source", f"/postroad/{source}".encode())


# The events of one batch often have one time, and those of one second begin alike.
@lru_cache(maxsize=256)
def _time(at_us: int) -> bytes:
    seconds, us = divmod(at_us, 1_000_000)
    return b"%b.%06d+00:00" % (_second(seconds), us) if us else _second(seconds) + b"+00:00"


@lru_cache(maxsize=256)
def _second(seconds: int) -> bytes:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat().encode()


def _decoder(kind: type[Message]) -> Callable[[bytes | None], Event]:
    parse, has_task = kind.FromString, kind in _WITH_TASK

    def decode(value: bytes | None) -> Event:
        if not value:
            raise Undecodable("the value is empty")
        try:
            event: Any = parse(value)
        except DecodeError as error:
            raise Undecodable(f"not a {kind.DESCRIPTOR.name}: {error}") from error
        if len(event.task.id if has_task else event.id) != 16:
            raise Undecodable(f"a {kind.DESCRIPTOR.name} whose task id is not 16 bytes")
        return event  # type: ignore[no-any-return]

    return decode


# Topic -> decoder; a decoder raises Undecodable on anything that is not an event of its topic.
DECODERS: Mapping[str, Callable[[bytes | None], Event]] = {
    topic: _decoder(kind) for kind, topic in _TOPICS.items()
}
