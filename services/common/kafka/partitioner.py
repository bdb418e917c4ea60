"""Chooses the partition of a key as producers do, and makes keys of a chosen partition. Pure.

A hash takes a key's last four bytes in by steps that can all be undone. So the hash that a key shall have and
the key's first bytes determine its last four bytes (docs/adr/0032-tasks-of-one-batch-share-a-partition.md).
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct

__all__ = ["complete_key", "partition_of"]

_SEED = 0x9747B28C
_M = 0x5BD1E995
_INVERSE_M = pow(_M, -1, 1 << 32)
_MASK = 0xFFFFFFFF
_POSITIVE = 0x7FFFFFFF
_HEAD = Struct("<3I")
_TAIL = Struct("<I")


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition of a key whose length is a multiple of four, as that of a task's id is."""
    h = _SEED ^ len(key)
    for start in range(0, len(key), 4):
        h = _mix(h, int.from_bytes(key[start : start + 4], "little"))
    h = (h ^ h >> 13) * _M & _MASK
    return ((h ^ h >> 15) & _POSITIVE) % partitions


def complete_key(head: bytes, partition: int, partitions: int, random: int) -> bytes:
    """Return `head` (12 bytes) with four more, so that the key belongs to `partition` of `partitions`.

    `random` has 32 bits. Where they are uniform, the four bytes are uniform among those of the partition.
    """
    h = random & _POSITIVE
    h += partition - h % partitions
    if h > _POSITIVE:
        h -= partitions
    h |= random & ~_POSITIVE
    # Undo the steps after the last block, and then those by which the block enters.
    h ^= h >> 15 ^ h >> 30
    h = h * _INVERSE_M & _MASK
    h ^= h >> 13 ^ h >> 26
    first, second, third = _HEAD.unpack(head)
    k = (h ^ _mix(_mix(_after(first), second), third) * _M & _MASK) * _INVERSE_M & _MASK
    return head + _TAIL.pack((k ^ k >> 24) * _INVERSE_M & _MASK)


# The first four bytes of a task's id change every 65 s.
@lru_cache(maxsize=4)
def _after(first: int) -> int:
    return _mix(_SEED ^ 16, first)


def _mix(h: int, block: int) -> int:
    k = block * _M & _MASK
    return (h * _M ^ (k ^ k >> 24) * _M) & _MASK
