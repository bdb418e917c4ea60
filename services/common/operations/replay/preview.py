"""What a replay would do, counted without doing it. Blocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sqlalchemy import Engine

from services.common.config import Settings
from services.common.events import task_id
from services.common.operations.replay.options import ReplayOptions
from services.common.operations.replay.records import OffsetRange, read_batches
from services.common.operations.replay.run import BATCH, OnProgress, decide_batch
from services.common.operations.replay.store import Counts

__all__ = ["MAX_TASKS", "DistinctTasks", "Preview", "preview"]

MAX_TASKS = 1_000_000
"""The most tasks that a preview counts. They take some 100 bytes each."""


class Preview(NamedTuple):
    """How many records there are, and how many tasks; `tasks` is None for more than MAX_TASKS."""

    counts: Counts
    tasks: Counts | None


class DistinctTasks:
    """Counts the distinct tasks of each kind of record, up to `most` in all."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._ids: dict[tuple[str, str, str], set[bytes]] | None = {}

    def add(self, seen: Iterable[tuple[tuple[str, str, str], bytes]]) -> None:
        """Count the tasks of these records, given by kind and task id."""
        for kind, id_ in seen:
            if self._ids is None:
                return
            self._ids.setdefault(kind, set()).add(id_)
            if sum(map(len, self._ids.values())) > self._most:
                self._ids = None

    def counts(self) -> Counts | None:
        """Return the number of tasks of each kind, None where there were more than `most`."""
        return None if self._ids is None else Counter({kind: len(ids) for kind, ids in self._ids.items()})


def preview(
    settings: Settings,
    engine: Engine,
    options: ReplayOptions,
    ranges: Mapping[int, OffsetRange],
    on_progress: OnProgress,
) -> Preview:
    """Return what a replay of these ranges would do if it ran now. It changes nothing.

    Raises `confluent_kafka.KafkaException` and `sqlalchemy.exc.DBAPIError`.
    """
    new_epoch = time.time_ns() // 1_000_000
    counts: Counts = Counter()
    tasks = DistinctTasks(MAX_TASKS)
    left = sum(range_.left for range_ in ranges.values())
    for batch in read_batches(settings, options.topic, ranges, BATCH):
        decided = decide_batch(engine, options, new_epoch, batch)
        counts.update(one.kind for one in decided)
        tasks.add((one.kind, task_id(one.decoded.event)) for one in decided if one.decoded is not None)
        left -= len(batch)
        on_progress(left)
    on_progress(0)
    return Preview(counts, tasks.counts())
