"""Resume tokens: where a Watch goes on, bound to who watches what. Pure.

Opaque to clients, not secret: a token says from where to read, never whose tasks to show. Its second part,
the positions, is the same for all who watch, so it is written once a batch.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from hashlib import blake2b
from zlib import crc32

from services.api.errors import invalid_field
from services.api.watch.changes import Place
from services.common.kafka.topics import EVENT_TOPICS

__all__ = ["bound", "parse", "written"]

_VERSION = b"\x01"
# Nine bytes are twelve characters of base64 without padding, so that the two parts can be put together.
_DIGEST = 8
_HEAD = 12
# Some 700 partitions a topic, of large offsets.
_LONGEST = 64 << 10


def bound(bound_to: bytes) -> str:
    """Return a token's first part; `bound_to` is a digest of the tenant and of what is watched."""
    return urlsafe_b64encode(_VERSION + blake2b(bound_to, digest_size=_DIGEST).digest()).decode()


def written(positions: Mapping[Place, int]) -> str:
    """Return a token's second part: each partition's next offset, 0 where none is named."""
    raw = bytearray()
    for topic in EVENT_TOPICS:
        offsets = {number: offset for (name, number), offset in positions.items() if name == topic}
        count = max(offsets, default=-1) + 1
        _put(raw, count)
        for number in range(count):
            _put(raw, offsets.get(number, 0))
    raw += crc32(raw).to_bytes(4, "big")
    return _text(bytes(raw))


def parse(text: str, bound_to: bytes) -> dict[Place, int]:
    """Return a token's positions; raise InvalidArgument where it is no token of this watch."""
    head, tail = text[:_HEAD], text[_HEAD:]
    if head != bound(bound_to) or len(text) > _LONGEST:
        raise invalid_field("resume_token", "is no token of a watch of this task or filter")
    try:
        positions = _positions(_raw(tail))
    except (ValueError, IndexError):
        raise invalid_field("resume_token", "is cut off or changed") from None
    return positions


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode().rstrip("=")


def _raw(text: str) -> bytes:
    raw = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    # base64 has several spellings of the same bytes, a token has one.
    if _text(raw) != text:
        raise ValueError("another spelling")
    return raw


def _positions(raw: bytes) -> dict[Place, int]:
    body = raw[:-4]
    if crc32(body).to_bytes(4, "big") != raw[-4:]:
        raise ValueError("another checksum")
    positions: dict[Place, int] = {}
    at = 0
    for topic in EVENT_TOPICS:
        count, at = _number(body, at)
        for number in range(count):
            positions[topic, number], at = _number(body, at)
    if at != len(body):
        raise ValueError("more than there should be")
    return positions


def _put(raw: bytearray, number: int) -> None:
    while number > 127:
        raw.append(number & 127 | 128)
        number >>= 7
    raw.append(number)


def _number(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = raw[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    if number >= 1 << 63:
        raise ValueError("no offset")
    return number, at
