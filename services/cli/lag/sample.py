"""What Kafka says of the stages at one moment. Plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Group", "Head", "Member", "Place", "Sample"]


class Place(NamedTuple):
    """A partition; the topic is named without the installation's prefix."""

    topic: str
    partition: int


class Head(NamedTuple):
    """The first record that waits in a partition: when it was written and, delayed, is due. Unix seconds."""

    written: float
    due: float | None


@dataclass(frozen=True, slots=True)
class Member:
    """One replica of a stage, as the group knows it, and the partitions that are its."""

    id: str
    client: str
    host: str
    owns: frozenset[Place]


@dataclass(frozen=True, slots=True)
class Group:
    """A stage's consumer group. `state` is Kafka's word: stable, empty, dead, ..."""

    name: str
    state: str
    members: Sequence[Member]


@dataclass(frozen=True, slots=True)
class Sample:
    """All of it. `committed` has no entry for a partition that was never committed."""

    at: float
    starts: Mapping[Place, int]
    ends: Mapping[Place, int]
    groups: Mapping[str, Group]
    committed: Mapping[str, Mapping[Place, int]]
    heads: Mapping[tuple[str, Place], Head] = field(default_factory=dict)

    def position(self, stage: str, place: Place) -> int:
        """Return where the stage goes on: its commit, or the first record that is still there."""
        return max(self.committed[stage].get(place, 0), self.starts[place])

    def waiting(self, stage: str, place: Place) -> int:
        """Return the records that the stage has not committed."""
        return max(0, self.ends[place] - self.position(stage, place))
