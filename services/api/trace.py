"""The W3C trace context of a request (Trace Context level 1, section 3.2), carried along with its task."""

from __future__ import annotations

import re

__all__ = ["traceparent"]

_ZERO = "0"
_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


def traceparent(given: str | bytes | None, id_: bytes) -> bytes:
    """Return the traceparent that a client gave where it is a valid one, otherwise one made of the task's id.

    So a task whose client traces nothing is found in a trace store by its own id.
    """
    if isinstance(given, str):
        match = _FORM.fullmatch(given)
        if match is not None and all(part.strip(_ZERO) for part in match.groups()):
            return given.encode()
    digits = id_.hex()
    return f"00-{digits}-{digits[16:]}-01".encode()
