"""Resolutions: records on a dead-letter topic that say which of its dead letters are done. Pure.

Kafka cannot delete one record from the middle of a partition. So whoever resolves dead letters appends a
resolution to their partition, which names their offsets. Readers leave these dead letters out. Once
everything at a partition's start is resolved, it is deleted together with its resolutions: a resolution names
earlier offsets alone.

A resolution has no key, no value and two headers: `resolves`, the offsets (`3-5,8`), and `resolution`, what
became of them. Any other record with a header `resolves` is a dead letter. So is a record that names no
offset before its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from services.common.kafka.headers import RESOLUTION, RESOLVES
from services.common.kafka.records import Headers, parse_number

__all__ = ["MAX_OFFSETS", "DeadLetterResolution", "resolution_headers", "resolved_offsets"]

DeadLetterResolution = Literal["replayed", "purged"]
"""What became of dead letters: their records were redriven, or nothing more happens to them."""

MAX_OFFSETS = 5000
"""The most offsets that one resolution names."""


def resolution_headers(offsets: Iterable[int], resolution: DeadLetterResolution) -> Headers:
    """Return the headers of the record that resolves these dead letters of its partition."""
    return [(RESOLVES, _ranges(sorted(offsets)).encode()), (RESOLUTION, resolution.encode())]


def resolved_offsets(
    offset: int, key: bytes | None, value: bytes | None, headers: Headers | None
) -> list[range] | None:
    """Return the offsets that the record at `offset` resolves, None where it is no resolution.

    All are below `offset`. Parts that cannot be read resolve nothing.
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
