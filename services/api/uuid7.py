"""UUIDv7 ids (RFC 9562 section 5.7) that sort by creation time.

rand_a holds the fraction of the millisecond (RFC 9562 section 6.2, method 3), and no two ids of one process
share a microsecond. An id therefore contains its task's creation time to the microsecond, and a range of
times is a range of ids.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

__all__ = ["IdGenerator", "lowest", "parse", "text"]

_TEXT_FORM = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_LIMIT_US = (1 << 48) * 1000
_VERSION = 7 << 76
_VARIANT = 2 << 62
_RANDOM_MASK = (1 << 62) - 1


def _head(us: int) -> int:
    ms, rest = divmod(us, 1000)
    # The 1000 microseconds map to the 4096 values of rand_a without a collision, and keep their order.
    return ms << 80 | _VERSION | (rest * 4096 // 1000) << 64 | _VARIANT


class IdGenerator:
    """Makes ids. A process has one. Not thread-safe."""

    def __init__(self, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._now_ns = now_ns
        self._last_us = 0
        self._pool, self._used = b"", 0

    def new(self) -> tuple[bytes, int]:
        """Return a new id (16 bytes) and its time in microseconds since the Unix epoch.

        Ids and times rise strictly, even while the system's clock stands still or steps back.
        """
        us = self._now_ns() // 1000
        if us <= self._last_us:
            us = self._last_us + 1
        self._last_us = us
        return (_head(us) | self._random()).to_bytes(16, "big"), us

    def _random(self) -> int:
        # Each os.urandom is a system call that releases the GIL, so one call serves 256 ids.
        if self._used >= len(self._pool):
            self._pool, self._used = os.urandom(8 * 256), 0
        start, self._used = self._used, self._used + 8
        return int.from_bytes(self._pool[start : self._used], "big") & _RANDOM_MASK


def lowest(us: int) -> bytes:
    """Return the lowest id of this microsecond; of the nearest one where no id can contain the time."""
    return _head(min(max(us, 0), _LIMIT_US - 1)).to_bytes(16, "big")


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
