"""Markers: records on a dead-letter topic that say which of its letters are done with. Pure.

Kafka cannot delete one record from the middle of a partition. So whoever resolves letters appends a record to
their partition that names their offsets; who reads the letters leaves those out. What is resolved from the
partition's start on is then deleted for real, markers and all: a marker names only what stands before it.

A marker has no key and no value, and two headers: `resolves`, the offsets (`3-5,8`), and `resolution`, what
became of them. Any other record with a header `resolves` is a letter. So is one that names no offset before
its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from services.common.kafka.headers import RESOLUTION, RESOLVES
from services.common.kafka.records import Headers, parse_number

__all__ = ["MOST", "Resolution", "headers_of", "resolved"]

Resolution = Literal["replayed", "purged"]

MOST = 5000
"""Offsets that one marker names at most."""


def headers_of(offsets: Iterable[int], resolution: Resolution) -> Headers:
    """Return the headers of the marker that resolves these letters of its partition."""
    return [(RESOLVES, _ranges(sorted(offsets)).encode()), (RESOLUTION, resolution.encode())]


def resolved(
    offset: int, key: bytes | None, value: bytes | None, headers: Headers | None
) -> list[range] | None:
    """Return the offsets, all below `offset`, that the record there resolves; None where it is no marker.

    What cannot be read in a marker resolves nothing.
    """
    if key is not None or value is not None or [name for name, _ in headers or ()] != [RESOLVES, RESOLUTION]:
        return None
    found = []
    for part in (dict(headers or ())[RESOLVES] or b"").split(b","):
        start, _, end = part.partition(b"-")
        first, last = parse_number(start), parse_number(end or start)
        if first is not None and last is not None:
            found.append(range(first, min(last + 1, offset)))
    return [offsets for offsets in found if offsets] or None


def _ranges(offsets: Sequence[int]) -> str:
    parts: list[tuple[int, int]] = []
    for offset in offsets:
        if parts and offset == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], offset)
        else:
            parts.append((offset, offset))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
