"""Page tokens: the last id of a page, authenticated and bound to the tenant and filter of its List."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode

from services.api.errors import invalid_field
from services.api.token_keys import MAC_LENGTH, TokenKeys

__all__ = ["DEFAULT_SIZE", "MAX_SIZE", "decode", "encode", "page_size"]

DEFAULT_SIZE = 50
MAX_SIZE = 1000

_KIND = b"p"
_LENGTH = MAC_LENGTH + 22


def page_size(requested: int) -> int:
    """Return the size of a page: 50 for 0, at most 1000; raise InvalidArgument for a negative size."""
    if requested < 0:
        raise invalid_field("page_size", f"is 0 to {MAX_SIZE}, not negative")
    return min(requested, MAX_SIZE) or DEFAULT_SIZE


def encode(keys: TokenKeys, last_id: bytes, digest: bytes) -> str:
    """Return the token of the page after the task `last_id` (16 bytes), under the filter with this digest."""
    text = urlsafe_b64encode(last_id).decode().rstrip("=")
    return keys.sign(_KIND, digest, text) + text


def decode(keys: TokenKeys, token: str, digest: bytes) -> bytes | None:
    """Return the id after which the page begins, None for the empty token of the first page.

    Raises InvalidArgument for a token that `encode` did not make for this digest.
    """
    if not token:
        return None
    mac, text = token[:MAC_LENGTH], token[MAC_LENGTH:]
    if len(token) != _LENGTH or not keys.has_signed(mac, _KIND, digest, text):
        raise invalid_field("page_token", "is not a token of a List with this filter")
    return urlsafe_b64decode(text + "==")
