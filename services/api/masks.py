"""What an operator sees of a mail of another tenant: no address, no subject, no body. Pure."""

from __future__ import annotations

import re

from postroad.v1 import task_pb2
from postroad.v1.task_service_pb2 import WatchResponse

__all__ = ["MASK", "mask", "mask_watch_response"]

MASK = "***"

# RFC 5321 section 4.2 and RFC 3463: what a reply says by numbers.
_CODES = re.compile(r"[2-5][0-9]{2}(?:[ -][245]\.[0-9]{1,3}\.[0-9]{1,3})?(?=[ -]|\Z)")
_ADDRESS = re.compile(r"\S+@\S+")


def mask(task: task_pb2.Task) -> task_pb2.Task:
    """Mask a task in place, and return it. The domain, the labels and the codes of replies stay."""
    task.email = f"{MASK}@{task.email.rpartition('@')[2]}" if task.email else ""
    task.subject, task.body, task.html = (
        MASK if part else "" for part in (task.subject, task.body, task.html)
    )
    task.reply = _mask_reply(task.reply)
    for entry in task.timeline:
        _mask_entry(entry)
    return task


def mask_watch_response(serialized: bytes) -> bytes:
    """Return a serialized WatchResponse with its task and its change masked."""
    response = WatchResponse.FromString(serialized)
    if response.HasField("task"):
        mask(response.task)
    if response.HasField("change"):
        _mask_entry(response.change)
    return response.SerializeToString()


def _mask_entry(entry: task_pb2.TimelineEntry) -> None:
    entry.reply, entry.detail = _mask_reply(entry.reply), _ADDRESS.sub(MASK, entry.detail)


def _mask_reply(reply: str) -> str:
    """Return the codes alone: relays repeat addresses in the text."""
    if not reply:
        return ""
    codes = _CODES.match(reply)
    return f"{codes[0]} {MASK}" if codes else MASK
