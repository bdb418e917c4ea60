"""The W3C trace context of a request (Trace Context level 1, section 3.2), which its task's events carry."""

from __future__ import annotations

import re

__all__ = ["client_traceparent", "request_traceparent", "task_traceparent"]

_ZERO = "0"
_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


def request_traceparent(given: str | bytes | None, id_: bytes) -> bytes:
    """Return the client's traceparent if it is valid, otherwise one that contains the task's id."""
    return client_traceparent(given) or task_traceparent(id_)


def client_traceparent(given: str | bytes | None) -> bytes | None:
    """Return the client's traceparent if it is valid."""
    if isinstance(given, str):
        match = _FORM.fullmatch(given)
        if match is not None and all(part.strip(_ZERO) for part in match.groups()):
            return given.encode()
    return None


def task_traceparent(id_: bytes) -> bytes:
    """Return a traceparent that contains the task's id.

    An operator thus finds a task in a trace store by its id even if its client traces nothing.
    """
    digits = id_.hex()
    return f"00-{digits}-{digits[16:]}-01".encode()
