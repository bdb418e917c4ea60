"""What a Create may ask for: pure, the whole request at once, every refused field by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256

from postroad.v1 import events_pb2, task_service_pb2
from services.api import uuid7
from services.api.errors import Refused, Violation, invalid
from services.api.times import micros
from services.common.addresses import normalise
from services.common.header_fields import written

__all__ = [
    "MAX_AHEAD",
    "MAX_HEADERS",
    "MAX_KEY",
    "MAX_LABELS",
    "MAX_SUBJECT",
    "creation",
    "encoded_length",
    "label_problems",
    "task_id",
]

MAX_AHEAD = 365 * 86400
"""Seconds from now that a mail may be scheduled for."""
MAX_SUBJECT = 998
MAX_KEY = 255
MAX_HEADERS = 50
MAX_LABELS = 64
# RFC 5322 section 2.1.1: a line of a header field, its name and colon included, before folding.
_MAX_HEADER = 998
_TOO_LONG = f"has {_MAX_HEADER} bytes at most, its name included, encoded"
_MAX_LABEL_KEY, _MAX_LABEL_VALUE = 63, 255

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
# U+0085 is a line end to some readers and travels encoded; the other controls have no use in a header.
_CONTROL_IN_TEXT = re.compile("[\x00-\x1f\x7f-\x84\x86-\x9f]")
# RFC 5322 section 2.2: printable ASCII but the colon; 76 leaves room for a value on the same line.
_FIELD_NAME = re.compile("[!-9;-~]{1,76}")
# What the sender writes, what mail servers on the way write, and what would name other recipients.
_RESERVED = frozenset(
    {
        *("from", "to", "cc", "bcc", "sender", "subject", "date", "message-id", "mime-version"),
        *("received", "return-path", "delivered-to", "authentication-results", "dkim-signature"),
        *("arc-seal", "arc-message-signature", "arc-authentication-results"),
    }
)
_RESERVED_FAMILIES = ("content-", "resent-")


def creation(
    request: task_service_pb2.CreateRequest, tenant: str, key_in_metadata: str, max_body: int, now_us: int
) -> events_pb2.TaskCreated:
    """Return the event that this request asks for, without the id and the times that it is yet to get.

    The idempotency key may stand in the request, in the metadata, or the same in both. `max_body` is
    the bytes that text and HTML have together at most, `now_us` the time in microseconds since the Unix
    epoch. Raises Refused naming every field that cannot be.
    """
    data = request.data
    found: list[Violation] = []
    email, domain = _address(data.email, found)
    _subject(data.subject, found)
    _bodies(data, max_body, found)
    headers = _headers(data.headers, found) if data.headers else {}
    if data.labels:
        found += label_problems("data.labels", data.labels)
    key = request.idempotency_key or key_in_metadata
    if key:
        _key(key, key_in_metadata, found)
    send_at_us = _send_at(request, now_us, found)
    if found:
        raise Refused(found)
    task = events_pb2.MailTask(
        tenant=tenant,
        email=email,
        domain=domain,
        subject=data.subject,
        body=data.body if data.HasField("body") else None,
        html=data.html if data.HasField("html") else None,
        headers=headers,
        labels=data.labels,
    )
    if key:
        task.idempotency_key = key
        task.request_hash = _request_hash(task, data.headers, send_at_us)
    # What has passed means at once, as none given does; as a request it is another one.
    return events_pb2.TaskCreated(task=task, send_at_us=send_at_us if send_at_us > now_us else 0)


def task_id(text: str) -> bytes:
    """Return the 16 bytes of a task id in its text form; raise Refused naming the field `id`."""
    try:
        return uuid7.parse(text)
    except ValueError as error:
        raise invalid("id", str(error)) from None


def label_problems(field: str, labels: Mapping[str, str]) -> list[Violation]:
    """Return why these cannot be a task's labels, under the field's path; empty where they can."""
    if len(labels) > MAX_LABELS:
        return [Violation(field, f"{MAX_LABELS} at most")]
    found = []
    for key, value in sorted(labels.items()):
        if not key or len(key.encode()) > _MAX_LABEL_KEY or _CONTROL.search(key):
            problem = f"is no label key (1 to {_MAX_LABEL_KEY} bytes, no control characters)"
        elif len(value.encode()) > _MAX_LABEL_VALUE or _CONTROL.search(value):
            problem = f"is no label value ({_MAX_LABEL_VALUE} bytes at most, no control characters)"
        else:
            continue
        found.append(Violation(_member(field, key), problem))
    return found


def encoded_length(subject: str) -> int:
    """Return the bytes that a subject takes in a header: its own in printable ASCII, otherwise those of
    base64 encoded words (RFC 2047 section 2, 45 bytes of text in each) with a space between two.
    """
    if subject.isascii() and subject.isprintable():
        return len(subject)
    size = len(subject.encode())
    words = -(-size // 45)
    return 4 * -(-size // 3) + 12 * words + words - 1


def _key(key: str, in_metadata: str, found: list[Violation]) -> None:
    if in_metadata and in_metadata != key:
        found.append(Violation("idempotency_key", "differs from the metadata's idempotency-key"))
    elif len(key) > MAX_KEY or len(key.encode()) > MAX_KEY:
        found.append(Violation("idempotency_key", f"has {MAX_KEY} bytes at most"))
    elif _CONTROL.search(key):
        found.append(Violation("idempotency_key", "has control characters"))


def _send_at(request: task_service_pb2.CreateRequest, now_us: int, found: list[Violation]) -> int:
    """Return the time asked for in microseconds since the Unix epoch, rounded up, 0 where none is."""
    if not request.HasField("send_at"):
        return 0
    try:
        us = micros(request.send_at)
    except ValueError as error:
        found.append(Violation("send_at", str(error)))
        return 0
    if us > now_us + MAX_AHEAD * 10**6:
        found.append(Violation("send_at", f"is more than {MAX_AHEAD // 86400} days ahead"))
    return us


def _address(email: str, found: list[Violation]) -> tuple[str, str]:
    if not email:
        found.append(Violation("data.email", "is missing"))
        return "", ""
    try:
        return normalise(email)
    except ValueError as error:
        found.append(Violation("data.email", str(error)))
        return "", ""


def _subject(subject: str, found: list[Violation]) -> None:
    if not subject.strip():
        found.append(Violation("data.subject", "is missing" if not subject else "is blank"))
    elif _CONTROL_IN_TEXT.search(subject):
        found.append(Violation("data.subject", "has control characters"))
    elif len(subject) > MAX_SUBJECT or encoded_length(subject) > MAX_SUBJECT:
        found.append(Violation("data.subject", f"has {MAX_SUBJECT} bytes at most, encoded"))


def _bodies(data: task_service_pb2.TaskData, max_body: int, found: list[Violation]) -> None:
    if not data.HasField("body") and not data.HasField("html"):
        found.append(Violation("data.body", "is missing; it may be empty, or html be given instead"))
        return
    text, html = _size(data.body), _size(data.html)
    if text + html > max_body:
        field = "data.body" if text >= html else "data.html"
        found.append(Violation(field, f"text and HTML have {max_body} bytes at most, not {text + html}"))


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _headers(headers: Mapping[str, str], found: list[Violation]) -> dict[str, str]:
    """Return the fields as the mail will have them."""
    if len(headers) > MAX_HEADERS:
        found.append(Violation("data.headers", f"{MAX_HEADERS} at most"))
        return {}
    kept: dict[str, str] = {}
    seen = set()
    for name, value in sorted(headers.items()):
        lower = name.lower()
        if _FIELD_NAME.fullmatch(name) is None:
            problem = "is no header name (1 to 76 printable ASCII characters, no colon)"
        elif lower in _RESERVED or lower.startswith(_RESERVED_FAMILIES):
            problem = "is not a client's to write"
        elif lower in seen:
            problem = "is given twice"
        elif not value.strip():
            problem = "is empty"
        elif _CONTROL_IN_TEXT.search(value):
            problem = "has control characters"
        elif len(value) > _MAX_HEADER:
            problem = _TOO_LONG
        else:
            seen.add(lower)
            try:
                kept[name] = written(name, value)
            except ValueError as error:
                problem = str(error)
            else:
                if len(name) + 2 + encoded_length(kept[name]) <= _MAX_HEADER:
                    continue
                problem = _TOO_LONG
        found.append(Violation(_member("data.headers", name), problem))
    return kept


def _member(field: str, key: str) -> str:
    """Return the path of a map's entry, on one line whatever the key holds."""
    shown = key[:40].encode("unicode_escape").decode()
    return f'{field}["{shown}{"…" if len(key) > 40 else ""}"]'


def _request_hash(task: events_pb2.MailTask, headers: Mapping[str, str], send_at_us: int) -> bytes:
    """Return SHA-256 over what was asked for, normalised, its headers as given; each part with its length."""
    digest = sha256(b"1")
    bodies = [getattr(task, name) if task.HasField(name) else None for name in ("body", "html")]
    pairs = [part for field in (headers, task.labels) for part in (str(len(field)), *_flat(field))]
    for part in (task.email, task.subject, *bodies, *pairs):
        raw = b"" if part is None else part.encode()
        digest.update(b"-" if part is None else b"%d:" % len(raw))
        digest.update(raw)
    if send_at_us:
        digest.update(b"@%d" % send_at_us)
    return digest.digest()


def _flat(field: Mapping[str, str]) -> list[str]:
    return [text for pair in sorted(field.items()) for text in pair]
