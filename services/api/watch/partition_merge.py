"""Merges partitions, which are read at different speeds, into one sequence by their records' times. Pure.

The merge releases a change only once every partition that is still read has shown its next one. Until then it
keeps the changes of partitions that are ahead. `ahead` names the partitions to pause.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush

from services.api.watch.changes import Change
from services.common.kafka.topic_partition import TopicPartition

__all__ = ["PartitionMerge"]


class PartitionMerge:
    """Merges these partitions. Keeps about `max_kept` changes, and those that the client had fetched.

    A pause discards what the client fetched ahead. So all partitions that are ahead pause together, and
    rarely.
    """

    def __init__(self, partitions: Iterable[TopicPartition], max_kept: int = 20_000) -> None:
        self._max_kept, self._kept, self._full = max_kept, 0, False
        self._waiting: dict[TopicPartition, deque[tuple[int, Change]]] = {p: deque() for p in partitions}
        self._unseen = set(self._waiting)
        self._heads: list[tuple[int, TopicPartition]] = []
        self._ended: set[TopicPartition] = set()
        self._latest = dict.fromkeys(self._waiting, 0)

    def add(self, change: Change) -> None:
        """Add a partition's next change."""
        partition = change.partition
        # A partition keeps its order even where the times of its records step back.
        at = self._latest[partition] = max(self._latest[partition], change.at_ms)
        waiting = self._waiting[partition]
        waiting.append((at, change))
        self._kept += 1
        if len(waiting) == 1:
            self._unseen.discard(partition)
            heappush(self._heads, (at, partition))

    def end(self, partition: TopicPartition) -> None:
        """Expect no further change of this partition."""
        self._ended.add(partition)
        self._unseen.discard(partition)

    def release(self) -> list[Change]:
        """Return the next changes, as far as no earlier one can still come."""
        released: list[Change] = []
        while self._heads and not self._unseen:
            _, partition = heappop(self._heads)
            waiting = self._waiting[partition]
            released.append(waiting.popleft()[1])
            self._kept -= 1
            if waiting:
                heappush(self._heads, (waiting[0][0], partition))
            elif partition not in self._ended:
                self._unseen.add(partition)
        return released

    def ahead(self) -> set[TopicPartition]:
        """Return the partitions to pause until the others catch up; none before the merge is full.

        Once full, it stays so until it has released half of its changes.
        """
        self._full = self._kept >= self._max_kept or (self._full and self._kept > self._max_kept // 2)
        if not self._full:
            return set()
        enough = max(1, self._max_kept // 200)
        return {partition for partition, waiting in self._waiting.items() if len(waiting) >= enough}

    def first_offsets(self) -> dict[TopicPartition, int]:
        """Return the offset of the first kept change of each partition that has one."""
        return {partition: waiting[0][1].offset for partition, waiting in self._waiting.items() if waiting}
