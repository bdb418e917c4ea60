"""An mx.ok has the bytes that its message would have, though no message is made."""

from __future__ import annotations

import random

import pytest

from postroad.v1 import events_pb2 as pb
from services.common.events import EncodedEvent, encode
from services.validator.mx_ok import mx_ok

HOSTS = ((10, "mx1.test"), (20, "mx2.test"))
TASK = pb.MailTask(
    id=bytes(range(16)),
    tenant="t",
    email="someone@a.test",
    domain="a.test",
    subject="Grüße",
    body="text " * 100,
    html="",
    headers={f"X-{n}": str(n) for n in range(20)},
    labels={"team": "red", "a": "b"},
    created_at_us=5,
)


def message(created: pb.TaskCreated, attempt: int = 1, at_us: int = 1_700_000_000_000_001) -> pb.MxOk:
    hosts = [pb.MailHost(preference=preference, name=name) for preference, name in HOSTS]
    return pb.MxOk(
        task=created.task,
        epoch=created.epoch,
        attempt=attempt,
        hosts=hosts,
        at_us=at_us,
        send_at_us=created.send_at_us,
    )


@pytest.mark.parametrize("epoch", [0, 1_700_000_000_000])
@pytest.mark.parametrize("send_at_us", [0, 1_700_000_000_000_000])
@pytest.mark.parametrize("attempt", [1, 200])
@pytest.mark.parametrize("at_us", [1_700_000_000_000_000, 1_700_000_000_000_001])
def test_the_record_is_that_of_the_message(epoch: int, send_at_us: int, attempt: int, at_us: int) -> None:
    created = pb.TaskCreated(task=TASK, epoch=epoch, at_us=9, send_at_us=send_at_us)
    event = mx_ok(created, encode(created, "api").value, attempt, HOSTS, at_us)
    assert isinstance(event, EncodedEvent)
    assert encode(event, "validator", b"00-1") == encode(
        message(created, attempt, at_us), "validator", b"00-1"
    )


def test_a_task_in_several_fields_is_merged() -> None:
    first = pb.TaskCreated(task=TASK).SerializeToString()
    for second in (pb.TaskCreated(task=pb.MailTask(subject="Other"), epoch=3), pb.TaskCreated(epoch=3)):
        for value in (first + second.SerializeToString(), second.SerializeToString() + first):
            created = pb.TaskCreated.FromString(value)
            event = mx_ok(created, value, 1, HOSTS, 9)
            made = pb.MxOk.FromString(event.value) if isinstance(event, EncodedEvent) else event
            assert made == message(created, at_us=9)


def test_unknown_fields_of_the_task_are_carried_on() -> None:
    # The tag of field 999, a varint: a newer api may write it.
    task = TASK.SerializeToString(deterministic=True) + b"\xb8\x3e\x07"
    value = b"\x0a" + bytes((len(task) & 0x7F | 0x80, len(task) >> 7)) + task + b"\x18\x09"
    created = pb.TaskCreated.FromString(value)
    event = mx_ok(created, value, 1, HOSTS, 9)
    assert isinstance(event, EncodedEvent)
    assert event.value == message(created, at_us=9).SerializeToString(deterministic=True)


def test_without_the_bytes_the_message_is_made() -> None:
    created = pb.TaskCreated(task=TASK, epoch=random.randrange(9))
    assert mx_ok(created, None, 1, HOSTS, 9) == message(created, at_us=9)
