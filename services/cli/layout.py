"""How wide each column of a table is. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["GAP", "ColumnSize", "column_widths"]

GAP = 2
"""Blanks between two columns."""


@dataclass(frozen=True, slots=True)
class ColumnSize:
    """The width of a column's longest cell, and whether the column may be cut or dropped.

    `min_width` 0: it is never cut. Otherwise a narrower column would be of no use. `rank` 0: it is never
    dropped. Otherwise columns of the highest rank are dropped first.
    """

    natural: int
    min_width: int = 0
    rank: int = 0


def column_widths(sizes: Sequence[ColumnSize], max_width: int | None) -> list[int]:
    """Return each column's width, 0 for a dropped one. `max_width` None: there is no limit.

    Columns that are never cut and never dropped keep their widths, even where the table then exceeds the
    limit.
    """
    if max_width is None:
        return [size.natural for size in sizes]
    least = [min(size.natural, size.min_width) if size.min_width else size.natural for size in sizes]
    kept = set(range(len(sizes)))
    while sum(least[i] for i in kept) + GAP * (len(kept) - 1) > max_width:
        dropped = max(kept, key=lambda i: (sizes[i].rank, i), default=None)
        if dropped is None or sizes[dropped].rank == 0:
            break
        kept.remove(dropped)
    widths = [least[i] if i in kept else 0 for i in range(len(sizes))]
    left = max_width - sum(widths) - GAP * (len(kept) - 1)
    # The columns that would be cut share what is left evenly.
    while left > 0 and (short := [i for i in kept if widths[i] < sizes[i].natural]):
        share = max(1, left // len(short))
        for i in short:
            more = min(share, sizes[i].natural - widths[i], left)
            widths[i] += more
            left -= more
    return widths
