"""Page tokens: the last id of a page, bound to the filter of its List.

Clients treat a token as opaque, but it is no secret: it says where the list continues, not whose tasks.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import blake2b

from services.api.errors import invalid_field

__all__ = ["DEFAULT_SIZE", "MAX_SIZE", "decode", "encode", "page_size"]

DEFAULT_SIZE = 50
MAX_SIZE = 1000

_VERSION = b"\x01"
_CHECKSUM_SIZE = 8
_LENGTH = len(_VERSION) + 16 + _CHECKSUM_SIZE


def page_size(requested: int) -> int:
    """Return the size of a page: 50 for 0, at most 1000; raise InvalidArgument for a negative size."""
    if requested < 0:
        raise invalid_field("page_size", f"is 0 to {MAX_SIZE}, not negative")
    return min(requested, MAX_SIZE) or DEFAULT_SIZE


def encode(last_id: bytes, digest: bytes) -> str:
    """Return the token of the page after the task `last_id` (16 bytes), under the filter with this digest."""
    return urlsafe_b64encode(_VERSION + last_id + _checksum(last_id, digest)).decode().rstrip("=")


def decode(token: str, digest: bytes) -> bytes | None:
    """Return the id after which the page begins, None for the empty token of the first page.

    Raises InvalidArgument for a token that `encode` did not make for this digest.
    """
    if not token:
        return None
    try:
        raw = urlsafe_b64decode(token.encode("ascii") + b"=" * (-len(token) % 4))
    except ValueError:
        raw = b""
    last_id = raw[1:17]
    # base64 spells the same bytes in several ways. Only the spelling of `encode` is accepted.
    if len(raw) != _LENGTH or raw[17:] != _checksum(last_id, digest) or encode(last_id, digest) != token:
        raise invalid_field("page_token", "is not a token of a List with this filter")
    return last_id


def _checksum(last_id: bytes, digest: bytes) -> bytes:
    return blake2b(_VERSION + last_id + digest, digest_size=_CHECKSUM_SIZE).digest()
