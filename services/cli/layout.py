"""How wide each column of a table gets. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["GAP", "Shape", "widths"]

GAP = 2
"""Blanks between two columns."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a column needs: its longest cell, and whether it may be cut or left out.

    `least` is the width below which a cut column is of no use; 0: it is never cut. `rank` says which columns
    go first where there is no room: the highest; 0: it never goes.
    """

    natural: int
    least: int = 0
    rank: int = 0


def widths(shapes: Sequence[Shape], room: int | None) -> list[int]:
    """Return each column's width, 0 for one that is left out; `room` None means no bound.

    Columns that are never cut and never go keep their width even where the room is too small for them.
    """
    if room is None:
        return [shape.natural for shape in shapes]
    floors = [min(shape.natural, shape.least) if shape.least else shape.natural for shape in shapes]
    kept = set(range(len(shapes)))
    while sum(floors[i] for i in kept) + GAP * (len(kept) - 1) > room:
        goes = max(kept, key=lambda i: (shapes[i].rank, i), default=None)
        if goes is None or shapes[goes].rank == 0:
            break
        kept.remove(goes)
    given = [floors[i] if i in kept else 0 for i in range(len(shapes))]
    left = room - sum(given) - GAP * (len(kept) - 1)
    # What is left goes, evenly, to those that would be cut.
    while left > 0 and (short := [i for i in kept if given[i] < shapes[i].natural]):
        share = max(1, left // len(short))
        for i in short:
            more = min(share, shapes[i].natural - given[i], left)
            given[i] += more
            left -= more
    return given
