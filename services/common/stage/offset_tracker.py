"""Says which offset of one assigned partition may be committed."""

from __future__ import annotations

__all__ = ["OffsetTracker"]


class OffsetTracker:
    """Tracks the records fetched from one assignment of a partition, and the offset to commit.

    The offset to commit is the lowest unfinished one or, with none unfinished, the one after the highest. It
    never goes back, even where a record is fetched a second time. Offsets rise with gaps (compaction,
    transaction markers, retention), so it is never counted.

    Records are told apart by identity, not by offset. Pure: no I/O, no clock, no Kafka types.
    """

    __slots__ = ("_next", "_to_commit", "_unfinished")

    def __init__(self) -> None:
        self._unfinished: dict[object, int] = {}
        self._next: int | None = None
        self._to_commit: int | None = None

    def __len__(self) -> int:
        """Return how many records are unfinished."""
        return len(self._unfinished)

    def add(self, record: object, offset: int) -> None:
        """Note that `record` was fetched at `offset`; it is unfinished from now on."""
        self._unfinished[record] = offset
        if self._next is None or offset >= self._next:
            self._next = offset + 1

    def finish(self, record: object) -> bool:
        """Note that `record` is finished. Return False where it is unknown here or was finished before."""
        return self._unfinished.pop(record, None) is not None

    def to_commit(self) -> int | None:
        """Return the offset to commit, which is the next one to read; None before the first record."""
        reached = min(self._unfinished.values()) if self._unfinished else self._next
        if reached is not None and (self._to_commit is None or reached > self._to_commit):
            self._to_commit = reached
        return self._to_commit
