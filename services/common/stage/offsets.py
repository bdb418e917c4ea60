"""Which offset of one assigned partition may be committed."""

from __future__ import annotations

__all__ = ["Offsets"]


class Offsets:
    """What was handed out from one assignment of a partition, and how far it may be committed.

    Offsets rise but have gaps (compaction, transaction markers, what retention removed), so the position
    is never counted: it is the lowest unfinished offset or, with none unfinished, the one after the
    highest seen. It never goes back, even where an offset is handed out a second time.

    A record is told by its identity (`mark`), not by its offset. Pure: no I/O, no clock, no Kafka types.
    """

    __slots__ = ("_next", "_position", "_unfinished")

    def __init__(self) -> None:
        self._unfinished: dict[object, int] = {}
        self._next: int | None = None
        self._position: int | None = None

    def __len__(self) -> int:
        """Return how many are unfinished."""
        return len(self._unfinished)

    def seen(self, mark: object, offset: int) -> None:
        """Note that `mark` was handed out with `offset`; it is unfinished from now on."""
        self._unfinished[mark] = offset
        if self._next is None or offset >= self._next:
            self._next = offset + 1

    def finish(self, mark: object) -> bool:
        """Note that `mark` is finished. False where it is unknown here or was finished before."""
        return self._unfinished.pop(mark, None) is not None

    def position(self) -> int | None:
        """Return the offset to commit, which is the next one to read; None while nothing was seen."""
        reached = min(self._unfinished.values()) if self._unfinished else self._next
        if reached is not None and (self._position is None or reached > self._position):
            self._position = reached
        return self._position
