"""Page tokens: the last id of a page, bound to the filter it was listed by.

Opaque to clients, not secret: a token says where to go on, never whose tasks to show.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import blake2b

from services.api.errors import invalid

__all__ = ["DEFAULT_SIZE", "MAX_SIZE", "page_size", "position", "token"]

DEFAULT_SIZE = 50
MAX_SIZE = 1000

_VERSION = b"\x01"
_CHECK = 8
_LENGTH = len(_VERSION) + 16 + _CHECK


def page_size(asked: int) -> int:
    """Return the rows of a page: 50 for 0, 1000 at most; raise Refused for a negative size."""
    if asked < 0:
        raise invalid("page_size", f"is 0 to {MAX_SIZE}, not negative")
    return min(asked, MAX_SIZE) or DEFAULT_SIZE


def token(last: bytes, bound_to: bytes) -> str:
    """Return the token of the page after the task `last` (16 bytes), under the filter's digest."""
    return urlsafe_b64encode(_VERSION + last + _check(last, bound_to)).decode().rstrip("=")


def position(text: str, bound_to: bytes) -> bytes | None:
    """Return the id after which the page begins, None for the first page.

    Raises Refused where the token is not one of ours or was given under another filter.
    """
    if not text:
        return None
    try:
        raw = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except ValueError:
        raw = b""
    last = raw[1:17]
    # Written anew and compared: base64 has several spellings of the same bytes, a token has one.
    if len(raw) != _LENGTH or raw[17:] != _check(last, bound_to) or token(last, bound_to) != text:
        raise invalid("page_token", "is no token of a list with this filter")
    return last


def _check(last: bytes, bound_to: bytes) -> bytes:
    return blake2b(_VERSION + last + bound_to, digest_size=_CHECK).digest()
