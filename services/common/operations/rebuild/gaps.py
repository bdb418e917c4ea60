"""The gaps of the event topics: whole topics that were recreated, and records that are gone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from services.common.database.times import from_micros
from services.common.kafka.topics import EVENT_TOPICS, Names
from services.common.operations.topic_reader import TopicReader

__all__ = ["TopicGap", "find_gaps", "oldest_complete_id", "truncated_topics"]

# How far the clocks that made ids and records may differ.
_SKEW_MS = 60_000


@dataclass(frozen=True, slots=True)
class TopicGap:
    """A topic (bare name) that visibly lacks records which it once held.

    `recreated`: its id is not the one before, first seen at `since`. `truncated`: its retention or somebody
    deleted its oldest records, and it holds all from `since` on. `lacks`: only timelines show the gap.
    `records` counts the timeline entries whose records it lacks, without those of older tasks. Times are
    naive UTC.
    """

    topic: str
    cause: Literal["recreated", "truncated", "lacks"]
    records: int
    since: datetime | None = None


def truncated_topics(topics: TopicReader) -> dict[str, int]:
    """Return the topics (full names) that lost old records, and since when they hold all (Unix ms)."""
    now = time.time_ns() // 1_000_000
    since: dict[str, int] = {}
    for partition, offset in topics.start.items():
        if offset > 0:
            first = topics.first_ms.get(partition, now)
            since[partition.topic] = max(since.get(partition.topic, 0), first)
    return since


def oldest_complete_id(truncated: Mapping[str, int]) -> bytes | None:
    """Return the id below which a task may have events that the topics lost, None where none may have.

    `truncated` is what `truncated_topics` returns.
    """
    if not truncated:
        return None
    since = max(truncated.values()) + _SKEW_MS
    return (since << 80).to_bytes(16)  # a UUIDv7 begins with 48 bits of milliseconds


def find_gaps(
    names: Names,
    recreated: Mapping[str, datetime],
    truncated: Mapping[str, int],
    gap_entries: Mapping[str, int],
) -> list[TopicGap]:
    """Return the topics that do not hold all that they once held.

    `recreated` and `truncated` say since when by a topic's full name, the latter in Unix milliseconds.
    `gap_entries` counts by a topic's bare name the timeline entries whose records it lacks.
    """
    gaps = []
    for topic in EVENT_TOPICS:
        name, records = names.topic(topic), gap_entries.get(topic, 0)
        if name in recreated:
            gaps.append(TopicGap(topic, "recreated", records, recreated[name]))
        elif name in truncated:
            gaps.append(TopicGap(topic, "truncated", records, from_micros(1000 * truncated[name])))
        elif records:
            gaps.append(TopicGap(topic, "lacks", records))
    return gaps
