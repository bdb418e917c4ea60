"""The record of an event: its key, its value and its CloudEvents headers."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from postroad.v1 import events_pb2 as pb
from services.common.events import DECODERS, Event, encode, event_key, task_id

ID = bytes(range(16))
TASK = pb.MailTask(id=ID, headers={"b": "1", "a": "2"})


@pytest.mark.parametrize(
    ("event", "key"),
    [
        (pb.TaskCreated(task=TASK, epoch=3), "task.created:3:0"),
        (pb.MxOk(task=TASK, epoch=3, attempt=2), "mx.ok:3:2"),
        (pb.MxFailed(id=ID, attempt=2), "mx.failed:0:2"),
        (pb.MailSent(id=ID, attempt=2), "mail.sent:0:2"),
        (pb.MailDeferred(id=ID, attempt=2, stage="sender"), "mail.deferred:0:sender.2"),
        (
            pb.MailDeferred(id=ID, attempt=2, stage="sender", in_doubt=True, takeover=4),
            "mail.deferred:0:sender.2:in_doubt.4",
        ),
        (pb.MailFailed(id=ID, attempt=2), "mail.failed:0:2"),
        (pb.TaskCancelled(id=ID, epoch=5), "task.cancelled:5:0"),
    ],
)
def test_each_event_has_its_key_and_headers(event: Event, key: str) -> None:
    assert event_key(event) == key
    assert task_id(event) == ID
    event.at_us = 1_700_000_000_000_001
    record = encode(event, "api", b"00-1")
    assert record.key == ID
    assert DECODERS[record.topic](record.value) == event
    assert record.headers == [
        ("ce_specversion", b"1.0"),
        ("ce_id", f"{ID.hex()}:{key}".encode()),
        ("ce_type", f"postroad.v1.{record.topic}".encode()),
        ("ce_source", b"/postroad/api"),
        ("ce_time", b"2023-11-14T22:13:20.000001+00:00"),
        ("content-type", b"application/protobuf"),
        ("traceparent", b"00-1"),
    ]


@pytest.mark.parametrize("at_us", [0, 1, 999_999, 1_700_000_000_000_000, 1_764_541_234_567_891])
def test_the_time_is_iso_8601_to_the_microsecond(at_us: int) -> None:
    headers = dict(encode(pb.MailSent(id=ID, at_us=at_us), "sender").headers)
    assert headers["ce_time"] == datetime.fromtimestamp(at_us / 1e6, UTC).isoformat().encode()
    assert "traceparent" not in headers
