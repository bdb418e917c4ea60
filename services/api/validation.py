"""Validates Create requests: checks every field, and reports all invalid ones at once. Pure."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from hashlib import sha256

from google.protobuf.timestamp_pb2 import Timestamp

from postroad.v1 import events_pb2, task_service_pb2
from services.api import uuid7
from services.api.errors import InvalidArgument, Violation, invalid_field
from services.common.addresses import normalise
from services.common.header_fields import canonical
from services.common.relay_headers import steers_a_relay

__all__ = [
    "MAX_AHEAD",
    "MAX_HEADERS",
    "MAX_KEY",
    "MAX_LABELS",
    "MAX_SUBJECT",
    "encoded_length",
    "label_violations",
    "task_created",
    "task_id",
    "timestamp_us",
]

MAX_AHEAD = 365 * 86400
"""Seconds from now for which a client may schedule a mail."""
MAX_SUBJECT = 998
MAX_KEY = 255
MAX_HEADERS = 50
MAX_LABELS = 64
# RFC 5322 section 2.1.1 limits a line, here a whole field with its name and colon, before folding.
_MAX_HEADER = 998
_TOO_LONG = f"has {_MAX_HEADER} bytes at most, its name included, encoded"
_MAX_LABEL_KEY, _MAX_LABEL_VALUE = 63, 255

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
# U+0085 is a line end to some mail readers, and the sender encodes it. A header needs no other control.
_CONTROL_IN_TEXT = re.compile("[\x00-\x1f\x7f-\x84\x86-\x9f]")
# RFC 5322 section 2.2: printable ASCII without the colon. 76 leaves space for a value on the same line.
_FIELD_NAME = re.compile("[!-9;-~]{1,76}")
# The sender and mail servers write these fields, or they would name other recipients.
_RESERVED = frozenset(
    {
        *("from", "to", "cc", "bcc", "sender", "subject", "date", "message-id", "mime-version"),
        *("received", "return-path", "delivered-to", "authentication-results", "dkim-signature"),
        *("arc-seal", "arc-message-signature", "arc-authentication-results"),
    }
)
_RESERVED_FAMILIES = ("content-", "resent-")


def task_created(
    request: task_service_pb2.CreateRequest,
    tenant: str,
    key_in_metadata: str,
    max_body: int,
    now_us: int,
    *,
    allowed_headers: Container[str] = (),
) -> events_pb2.TaskCreated:
    """Return the event of the requested task. The caller sets its id and its times.

    The client may send its idempotency key in the request, in the metadata, or in both. `max_body` limits the
    bytes of text and HTML together. `now_us` is in microseconds since the Unix epoch. `allowed_headers` holds
    the names, in lower case, of fields that may steer a relay.

    Raises InvalidArgument naming every invalid field.
    """
    data = request.data
    violations: list[Violation] = []
    # Each access to a text decodes it anew.
    subject = data.subject
    body = data.body if data.HasField("body") else None
    html = data.html if data.HasField("html") else None
    email, domain = _address(data.email, violations)
    _subject(subject, violations)
    _bodies(body, html, max_body, violations)
    headers, labels = data.headers, data.labels
    kept = _headers(headers, allowed_headers, violations) if headers else {}
    if labels:
        violations += label_violations("data.labels", labels)
    key = request.idempotency_key or key_in_metadata
    if key:
        _key(key, key_in_metadata, violations)
    send_at_us = _send_at(request, now_us, violations)
    if violations:
        raise InvalidArgument(violations)
    # A past `send_at` sends at once, like none. The request hash still distinguishes the two.
    event = events_pb2.TaskCreated()
    if send_at_us > now_us:
        event.send_at_us = send_at_us
    # The task is filled in its place: a message that is passed to a constructor is copied.
    task = event.task
    task.tenant, task.email, task.domain, task.subject = tenant, email, domain, subject
    if body is not None:
        task.body = body
    if html is not None:
        task.html = html
    if kept:
        task.headers.update(kept)
    if labels:
        task.labels.update(labels)
    if key:
        task.idempotency_key = key
        task.request_hash = _request_hash(task, headers, send_at_us)
    return event


def task_id(text: str) -> bytes:
    """Return the 16 bytes of a task id in its text form; raise InvalidArgument naming the field `id`."""
    try:
        return uuid7.parse(text)
    except ValueError as error:
        raise invalid_field("id", str(error)) from None


def timestamp_us(moment: Timestamp) -> int:
    """Return microseconds since the Unix epoch, rounded up, so that nothing happens too early.

    Raises ValueError outside the years of RFC 3339, which google.protobuf.Timestamp demands.
    """
    if not (-62135596800 <= moment.seconds < 253402300800 and 0 <= moment.nanos < 10**9):
        raise ValueError("is not a time of RFC 3339: the years 1 to 9999, and nanos from 0 to 999999999")
    return moment.seconds * 10**6 - (-moment.nanos // 1000)


def label_violations(field: str, labels: Mapping[str, str]) -> list[Violation]:
    """Return what is wrong with a task's labels, with paths under `field`; empty for valid labels."""
    if len(labels) > MAX_LABELS:
        return [Violation(field, f"{MAX_LABELS} at most")]
    violations = []
    for key, value in sorted(labels.items()):
        if not key or len(key.encode()) > _MAX_LABEL_KEY or _CONTROL.search(key):
            description = f"is not a label key (1 to {_MAX_LABEL_KEY} bytes, no control characters)"
        elif len(value.encode()) > _MAX_LABEL_VALUE or _CONTROL.search(value):
            description = f"is not a label value ({_MAX_LABEL_VALUE} bytes at most, no control characters)"
        else:
            continue
        violations.append(Violation(_entry_path(field, key), description))
    return violations


def encoded_length(subject: str) -> int:
    """Return the length in bytes of a subject in a header.

    Printable ASCII stays as it is. Other text becomes base64 encoded words (RFC 2047 section 2) of 45 bytes
    each, separated by spaces.
    """
    if subject.isascii() and subject.isprintable():
        return len(subject)
    size = len(subject.encode())
    words = -(-size // 45)
    return 4 * -(-size // 3) + 12 * words + words - 1


def _key(key: str, in_metadata: str, violations: list[Violation]) -> None:
    if in_metadata and in_metadata != key:
        violations.append(Violation("idempotency_key", "differs from the metadata's idempotency-key"))
    elif len(key) > MAX_KEY or len(key.encode()) > MAX_KEY:
        violations.append(Violation("idempotency_key", f"has {MAX_KEY} bytes at most"))
    elif _CONTROL.search(key):
        violations.append(Violation("idempotency_key", "has control characters"))


def _send_at(request: task_service_pb2.CreateRequest, now_us: int, violations: list[Violation]) -> int:
    """Return the requested time in microseconds since the Unix epoch, rounded up; 0 for none."""
    if not request.HasField("send_at"):
        return 0
    try:
        us = timestamp_us(request.send_at)
    except ValueError as error:
        violations.append(Violation("send_at", str(error)))
        return 0
    if us > now_us + MAX_AHEAD * 10**6:
        violations.append(Violation("send_at", f"is more than {MAX_AHEAD // 86400} days ahead"))
    return us


def _address(email: str, violations: list[Violation]) -> tuple[str, str]:
    if not email:
        violations.append(Violation("data.email", "is missing"))
        return "", ""
    try:
        return normalise(email)
    except ValueError as error:
        violations.append(Violation("data.email", str(error)))
        return "", ""


def _subject(subject: str, violations: list[Violation]) -> None:
    if subject.isascii() and subject.isprintable() and len(subject) <= MAX_SUBJECT and subject.strip():
        return
    if not subject.strip():
        violations.append(Violation("data.subject", "is missing" if not subject else "is blank"))
    elif _CONTROL_IN_TEXT.search(subject):
        violations.append(Violation("data.subject", "has control characters"))
    elif len(subject) > MAX_SUBJECT or encoded_length(subject) > MAX_SUBJECT:
        violations.append(Violation("data.subject", f"has {MAX_SUBJECT} bytes at most, encoded"))


def _bodies(body: str | None, html: str | None, max_body: int, violations: list[Violation]) -> None:
    if body is None and html is None:
        violations.append(
            Violation("data.body", "is missing; it may be empty, or the request may have html instead")
        )
        return
    text_size, html_size = _byte_size(body), _byte_size(html)
    if text_size + html_size > max_body:
        field = "data.body" if text_size >= html_size else "data.html"
        total = text_size + html_size
        violations.append(Violation(field, f"text and HTML have {max_body} bytes at most, not {total}"))


def _byte_size(text: str | None) -> int:
    if text is None:
        return 0
    return len(text) if text.isascii() else len(text.encode())


def _headers(
    headers: Mapping[str, str], allowed: Container[str], violations: list[Violation]
) -> dict[str, str]:
    """Return the fields as the mail will contain them."""
    if len(headers) > MAX_HEADERS:
        violations.append(Violation("data.headers", f"{MAX_HEADERS} at most"))
        return {}
    kept: dict[str, str] = {}
    seen = set()
    for name, value in sorted(headers.items()):
        lower = name.lower()
        if _FIELD_NAME.fullmatch(name) is None:
            description = "is not a header name (1 to 76 printable ASCII characters, no colon)"
        elif lower in _RESERVED or lower.startswith(_RESERVED_FAMILIES):
            description = "is written by Postroad or by mail servers, not by clients"
        elif steers_a_relay(lower) and lower not in allowed:
            description = "can steer a relay; an operator can allow it (POSTROAD_ALLOWED_HEADERS)"
        elif lower in seen:
            description = "is given twice"
        elif not value.strip():
            description = "is empty"
        elif _CONTROL_IN_TEXT.search(value):
            description = "has control characters"
        elif len(value) > _MAX_HEADER:
            description = _TOO_LONG
        else:
            seen.add(lower)
            try:
                kept[name] = canonical(name, value)
            except ValueError as error:
                description = str(error)
            else:
                if len(name) + 2 + encoded_length(kept[name]) <= _MAX_HEADER:
                    continue
                description = _TOO_LONG
        violations.append(Violation(_entry_path("data.headers", name), description))
    return kept


def _entry_path(field: str, key: str) -> str:
    """Return the path of a map's entry, with the key escaped and truncated."""
    shown = key[:40].encode("unicode_escape").decode()
    return f'{field}["{shown}{"…" if len(key) > 40 else ""}"]'


def _request_hash(task: events_pb2.MailTask, headers: Mapping[str, str], send_at_us: int) -> bytes:
    """Return SHA-256 of the normalised request, with its headers as the client sent them.

    Each part is hashed with its length, so that no two requests give the same bytes.
    """
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
