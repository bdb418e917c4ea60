"""Makes `mx.ok` from the bytes of `task.created`: both carry the same task.

A mail may be long. Copying its task and encoding it again would cost more than the rest of the validator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from postroad.v1 import events_pb2 as pb
from services.common.events import EncodedEvent, event_key
from services.common.kafka.topics import MX_OK
from services.validator.mx import Mx

__all__ = ["mx_ok"]

# Tag 1, length-delimited: `task` in a TaskCreated, and in an MxOk.
_TASK_TAG = 0x0A


def mx_ok(
    created: pb.TaskCreated, value: bytes | None, attempt: int, hosts: tuple[Mx, ...], at_us: int
) -> EncodedEvent | pb.MxOk:
    """Return the event that answers `created`; `value` are the bytes that it was decoded from, if known."""
    task = _encoded_task(value) if value else None
    if task is None:
        return pb.MxOk(
            task=created.task,
            epoch=created.epoch,
            attempt=attempt,
            hosts=_mail_hosts(hosts),
            at_us=at_us,
            send_at_us=created.send_at_us,
        )
    key, rest = _key_and_rest(created.epoch, attempt, hosts, at_us, created.send_at_us)
    return EncodedEvent(MX_OK, created.task.id, key, at_us, task + rest)


def _encoded_task(value: bytes) -> bytes | None:
    """Return the field `task` with its tag and length, None where it is not all in the first field.

    A producer may encode one message in several fields, which a decoder merges.
    """
    if value[0] != _TASK_TAG:
        return None
    length = shift = 0
    position = 1
    while True:
        byte = value[position]
        position += 1
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    end = position + length
    return None if pb.TaskCreated.FromString(value[end:]).HasField("task") else value[:end]


# The tasks of one batch mostly have all of these in common.
@lru_cache(maxsize=256)
def _key_and_rest(
    epoch: int, attempt: int, hosts: tuple[Mx, ...], at_us: int, send_at_us: int
) -> tuple[str, bytes]:
    """Return the event's key, and all of its fields but the task: they follow the task in their order."""
    event = pb.MxOk(
        epoch=epoch, attempt=attempt, hosts=_mail_hosts(hosts), at_us=at_us, send_at_us=send_at_us
    )
    return event_key(event), event.SerializeToString(deterministic=True)


def _mail_hosts(hosts: tuple[Mx, ...]) -> Sequence[pb.MailHost]:
    return [pb.MailHost(preference=preference, name=name) for preference, name in hosts]
