"""Turns events into records and back.

Headers follow CloudEvents' Kafka binding in binary mode (CloudEvents 1.0, Kafka Protocol Binding
section 3.2). `ce_id` is made from what the event says, not random: the same event published twice
(after a crash, by a replay) is recognised as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from google.protobuf.message import DecodeError, Message

from postroad.v1 import events_pb2 as pb
from services.common.kafka import topics
from services.common.kafka.records import Headers, OutgoingRecord

__all__ = ["CREATED_KEY", "DECODERS", "Event", "Undecodable", "encode", "event_key", "task_id"]

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


class Undecodable(ValueError):
    """A record that is no event of its topic; the text says why."""


def task_id(event: Event) -> bytes:
    """Return the 16 bytes of the event's task id."""
    return event.task.id if isinstance(event, pb.TaskCreated | pb.MxOk) else event.id


def event_key(event: Event) -> str:
    """Return what tells this event from all others of its task: topic, epoch, stage and attempt."""
    topic = _TOPICS[type(event)]
    attempt = getattr(event, "attempt", 0)
    if isinstance(event, pb.MailDeferred):
        doubt = f":in_doubt.{event.takeover}" if event.in_doubt else ""
        return f"{topic}:{event.epoch}:{event.stage}.{attempt}{doubt}"
    return f"{topic}:{event.epoch}:{attempt}"


CREATED_KEY = event_key(pb.TaskCreated())
"""The key of every task's first event."""


def encode(event: Event, source: str, traceparent: bytes | None = None) -> OutgoingRecord:
    """Return the record that carries `event`.

    `source` is the service that publishes it (`ce_source`); `traceparent` the W3C trace context to carry on.
    """
    topic = _TOPICS[type(event)]
    key = task_id(event)
    headers: Headers = [
        ("ce_specversion", b"1.0"),
        ("ce_id", f"{key.hex()}:{event_key(event)}".encode()),
        ("ce_type", f"postroad.v1.{topic}".encode()),
        ("ce_source", f"/postroad/{source}".encode()),
        ("ce_time", datetime.fromtimestamp(event.at_us / 1e6, UTC).isoformat().encode()),
        ("content-type", b"application/protobuf"),
    ]
    if traceparent is not None:
        headers.append(("traceparent", traceparent))
    # Maps in the order of their keys: the same event has the same bytes whoever publishes it.
    return OutgoingRecord(topic, key, event.SerializeToString(deterministic=True), headers)


def _decoder(kind: type[Message]) -> Callable[[bytes | None], Event]:
    def decode(value: bytes | None) -> Event:
        if not value:
            raise Undecodable("the value is empty")
        event = kind()
        try:
            event.ParseFromString(value)
        except DecodeError as error:
            raise Undecodable(f"not a {kind.DESCRIPTOR.name}: {error}") from error
        if len(task_id(event)) != 16:  # type: ignore[arg-type]
            raise Undecodable(f"a {kind.DESCRIPTOR.name} whose task id is not 16 bytes")
        return event  # type: ignore[return-value]

    return decode


# Topic -> decoder; a decoder raises Undecodable on anything that is not an event of its topic.
DECODERS: Mapping[str, Callable[[bytes | None], Event]] = {
    topic: _decoder(kind) for kind, topic in _TOPICS.items()
}
