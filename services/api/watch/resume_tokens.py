"""Resume tokens: where a Watch continues, bound to its tenant and to what it watches. Pure.

Clients treat a token as opaque, but it is no secret: it says from where to read, not whose tasks. Its second
part, the positions, is the same for all watchers, so the api encodes it once a batch.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from hashlib import blake2b
from zlib import crc32

from services.api.errors import invalid_field
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import EVENT_TOPICS

__all__ = ["decode", "encode_digest", "encode_positions"]

_VERSION = b"\x01"
# Nine bytes give twelve base64 characters without padding, so that the two parts can be concatenated.
_DIGEST_SIZE = 8
_HEAD_LENGTH = 12
# Enough for some 700 partitions a topic with large offsets.
_MAX_LENGTH = 64 << 10


def encode_digest(digest: bytes) -> str:
    """Return a token's first part. `digest` identifies the tenant and what it watches."""
    return urlsafe_b64encode(_VERSION + blake2b(digest, digest_size=_DIGEST_SIZE).digest()).decode()


def encode_positions(positions: Mapping[TopicPartition, int]) -> str:
    """Return a token's second part: the next offset of each partition, 0 for a missing one."""
    raw = bytearray()
    for topic in EVENT_TOPICS:
        offsets = {number: offset for (name, number), offset in positions.items() if name == topic}
        count = max(offsets, default=-1) + 1
        _append_varint(raw, count)
        for number in range(count):
            _append_varint(raw, offsets.get(number, 0))
    raw += crc32(raw).to_bytes(4, "big")
    return _encode_base64(bytes(raw))


def decode(token: str, digest: bytes) -> dict[TopicPartition, int]:
    """Return a token's positions; raise InvalidArgument for a token of another watch, or a damaged one."""
    head, tail = token[:_HEAD_LENGTH], token[_HEAD_LENGTH:]
    if head != encode_digest(digest) or len(token) > _MAX_LENGTH:
        raise invalid_field("resume_token", "is not a token of a Watch of this task or filter")
    try:
        return _decode_positions(_decode_base64(tail))
    except (ValueError, IndexError):
        raise invalid_field("resume_token", "is truncated or changed") from None


def _encode_base64(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode().rstrip("=")


def _decode_base64(text: str) -> bytes:
    raw = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    # base64 spells the same bytes in several ways. Only the spelling of `_encode_base64` is accepted.
    if _encode_base64(raw) != text:
        raise ValueError("another spelling")
    return raw


def _decode_positions(raw: bytes) -> dict[TopicPartition, int]:
    body = raw[:-4]
    if crc32(body).to_bytes(4, "big") != raw[-4:]:
        raise ValueError("another checksum")
    positions: dict[TopicPartition, int] = {}
    at = 0
    for topic in EVENT_TOPICS:
        count, at = _read_varint(body, at)
        for number in range(count):
            positions[TopicPartition(topic, number)], at = _read_varint(body, at)
    if at != len(body):
        raise ValueError("more than there should be")
    return positions


def _append_varint(raw: bytearray, number: int) -> None:
    while number > 127:
        raw.append(number & 127 | 128)
        number >>= 7
    raw.append(number)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """Return the number at this index, and the index after it."""
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
