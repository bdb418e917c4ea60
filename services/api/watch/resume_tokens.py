"""Resume tokens: where a Watch continues, authenticated and bound to its tenant and to what it watches. Pure.

A token has two parts. The second one, the positions, is the same for all watchers, so the api encodes it
once a batch. The first one authenticates the second for one watcher.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping

from services.api.errors import invalid_field
from services.api.token_keys import MAC_LENGTH, TokenKeys
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import EVENT_TOPICS

__all__ = ["decode", "encode_positions", "token"]

_KIND = b"r"
# Enough for some 700 partitions a topic with large offsets.
_MAX_LENGTH = 64 << 10


def token(keys: TokenKeys, digest: bytes, positions_text: str) -> str:
    """Return a token. `digest` (16 bytes) identifies the tenant and what it watches."""
    return keys.sign(_KIND, digest, positions_text) + positions_text


def encode_positions(positions: Mapping[TopicPartition, int]) -> str:
    """Return a token's second part: the next offset of each partition, 0 for a missing one."""
    raw = bytearray()
    for topic in EVENT_TOPICS:
        offsets = {number: offset for (name, number), offset in positions.items() if name == topic}
        count = max(offsets, default=-1) + 1
        _append_varint(raw, count)
        for number in range(count):
            _append_varint(raw, offsets.get(number, 0))
    return urlsafe_b64encode(raw).decode().rstrip("=")


def decode(keys: TokenKeys, token: str, digest: bytes) -> dict[TopicPartition, int]:
    """Return a token's positions; raise InvalidArgument for one that the api did not give to this watch."""
    mac, text = token[:MAC_LENGTH], token[MAC_LENGTH:]
    # Only what the api has written itself is decoded.
    if len(token) > _MAX_LENGTH or not keys.has_signed(mac, _KIND, digest, text):
        raise invalid_field("resume_token", "is not a token of a Watch of this task or filter")
    try:
        return _decode_positions(urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, IndexError):
        raise invalid_field("resume_token", "is of another version") from None


def _decode_positions(raw: bytes) -> dict[TopicPartition, int]:
    positions: dict[TopicPartition, int] = {}
    at = 0
    for topic in EVENT_TOPICS:
        count, at = _read_varint(raw, at)
        for number in range(count):
            positions[TopicPartition(topic, number)], at = _read_varint(raw, at)
    if at != len(raw):
        raise ValueError("more than there should be")
    return positions


def _append_varint(raw: bytearray, number: int) -> None:
    while number > 127:
        raw.append(number & 127 | 128)
        number >>= 7
    raw.append(number)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """Return the number at this index, and the index after it."""
    number = 0
    for shift in range(0, 63, 7):
        byte = raw[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise ValueError("no offset")
