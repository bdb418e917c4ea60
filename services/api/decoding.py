"""Requests as they arrive, bytes, made messages; pure."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from services.api.errors import invalid_field

__all__ = ["MAX_QUESTION", "decode", "question"]

M = TypeVar("M", bound=Message)

MAX_QUESTION = 256 << 10
"""Bytes of a request that brings no mail: four times the longest resume token."""


def decode(raw: bytes, kind: type[M]) -> M:
    """Return the message that these bytes are; raise InvalidArgument where they are none."""
    request = kind()
    try:
        request.ParseFromString(raw)
    except DecodeError:
        raise invalid_field("request", f"the bytes are no {kind.DESCRIPTOR.full_name}") from None
    return request


def question(raw: bytes, kind: type[M]) -> M:
    """Return a request that brings no mail; raise InvalidArgument also where it is too large, undecoded."""
    if len(raw) > MAX_QUESTION:
        raise invalid_field("request", f"has {MAX_QUESTION} bytes at most, not {len(raw)}")
    return decode(raw, kind)
