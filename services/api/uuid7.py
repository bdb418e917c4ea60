"""UUIDv7 ids (RFC 9562 section 5.7) that sort by creation time.

rand_a holds the fraction of the millisecond (RFC 9562 section 6.2, method 3), and no two ids of one process
share a microsecond. An id therefore contains its task's creation time to the microsecond, and a range of
times is a range of ids.

rand_b has 62 bits. Ids that share a partition of n (docs/adr/0032) have log2(n) random bits fewer: 58 remain
with 12 partitions.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from math import gcd
from struct import unpack

from services.common.kafka.partitioner import complete_key

__all__ = ["IdGenerator", "lowest", "parse", "text"]

_TEXT_FORM = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_LIMIT_US = (1 << 48) * 1000
_VERSION = 7 << 12
_VARIANT = 2 << 30
_WORD = (1 << 32) - 1
_SHARED_US = 50_000
"""Microseconds for which single ids share a partition: longer than a publisher gathers single records."""


def _head(us: int) -> int:
    """Return the first 64 bits of the ids of this microsecond."""
    ms, rest = divmod(us, 1000)
    # The 1000 microseconds map to the 4096 values of rand_a without a collision, and keep their order.
    return ms << 16 | _VERSION | rest * 4096 // 1000


class IdGenerator:
    """Makes ids. A process has one. Not thread-safe.

    The ids of a batch, and the single ones of 50 ms, are keys of one partition of each topic, which has so
    many `partitions`. All partitions take turns.
    """

    def __init__(self, now_ns: Callable[[], int] = time.time_ns, partitions: int = 1) -> None:
        self._now_ns = now_ns
        self._last_us = 0
        self._partitions, self._step = partitions, _step(partitions)
        self._latest = int.from_bytes(os.urandom(4)) % partitions
        self._of_singles, self._shared_until = self._latest, 0
        self._random: Iterator[int] = iter(())

    def new(self) -> tuple[bytes, int]:
        """Return a new id (16 bytes) and its time in microseconds since the Unix epoch.

        Ids and times rise strictly, even while the system's clock stands still or steps back.
        """
        us = self._reserve(1)
        if us >= self._shared_until:
            self._of_singles, self._shared_until = self._next_partition(), us + _SHARED_US
        bits = next(self._random, None)
        if bits is None:
            # Each os.urandom is a system call that releases the GIL, so one call serves 256 ids.
            self._random = _random(256)
            bits = next(self._random)
        return _make(us, bits, self._of_singles, self._partitions), us

    def batch(self, count: int) -> list[tuple[bytes, int]]:
        """Return the ids and the times of a batch, as `count` calls of `new` would."""
        first, partition = self._reserve(count), self._next_partition()
        times = range(first, first + count)
        return [
            (_make(us, bits, partition, self._partitions), us)
            for us, bits in zip(times, _random(count), strict=True)
        ]

    def _reserve(self, count: int) -> int:
        """Return the first of so many microseconds that no other id has."""
        first = max(self._now_ns() // 1000, self._last_us + 1)
        self._last_us = first + count - 1
        return first

    def _next_partition(self) -> int:
        self._latest = (self._latest + self._step) % self._partitions
        return self._latest


def _random(count: int) -> Iterator[int]:
    return iter(unpack(f"{count}Q", os.urandom(8 * count)))


def _make(us: int, bits: int, partition: int, partitions: int) -> bytes:
    """Return the id of this time and partition, given 64 random bits."""
    head = (_head(us) << 32 | _VARIANT | bits >> 34).to_bytes(12)
    return complete_key(head, partition, partitions, bits & _WORD)


def _step(partitions: int) -> int:
    """Return the step from one partition to the next.

    It is near the golden section, because neighbours belong to one replica of a stage. Without a common
    divisor it reaches every partition.
    """
    step = max(1, round(partitions * 0.618))
    while gcd(step, partitions) != 1:
        step += 1
    return step


def lowest(us: int) -> bytes:
    """Return the lowest id of this microsecond; of the nearest one where no id can contain the time."""
    return (_head(min(max(us, 0), _LIMIT_US - 1)) << 32 | _VARIANT).to_bytes(12) + bytes(4)


def text(id_: bytes) -> str:
    """Return the text form of an id's 16 bytes (RFC 9562 section 4)."""
    digits = id_.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def parse(value: str) -> bytes:
    """Return the 16 bytes of an id in its text form, of any UUID version; raise ValueError otherwise.

    Accepts only the form with hyphens, in upper or lower case.
    """
    if _TEXT_FORM.fullmatch(value) is None:
        raise ValueError("not the text form of a UUID")
    return bytes.fromhex(value.replace("-", ""))
