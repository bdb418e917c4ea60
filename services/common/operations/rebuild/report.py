"""What a rebuild reports while it runs and at its end. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from services.common.operations.rebuild.diff import RowDifference
from services.common.operations.rebuild.gaps import TopicGap

__all__ = ["RebuildProgress", "RebuildReport"]


class RebuildProgress(Protocol):
    """The caller's view of a running rebuild, such as a progress bar."""

    def total(self, events: int) -> None:
        """Take the number of events that the rebuild will read."""

    def advance(self, events: int = 1) -> None:
        """Take the number of events that the rebuild has read since the last call."""

    def note(self, text: str) -> None:
        """Take a few words on what the rebuild does now."""


@dataclass(slots=True)
class RebuildReport:
    """What a rebuild found and did. A number counts rows of `tasks` unless it says otherwise.

    - `events`: decoded records, `undecodable`: other records, `refused`: tasks whose data the database
      refuses
    - `missing`: the topics hold the task and the table does not, `differing`: a column differs
    - `extra`: the topics know nothing of the task, though they hold its time; its row is copied
    - `recorded`: not published yet, such as a scheduled task, `older`: than what the topics hold; both are
      copied
    - `kept`: the row knows more than the topics, which have a gap (`gone`); it stays as it is
    - `partial`: neither the topics nor the table hold the task's `task.created`
    - `lines_missing`, `lines_differing`, `lines_extra`: the same for timeline entries
    - `bodies`, `deliveries`: how many were missing
    - `locked_ms`: how long writers waited for the swap, `seconds`: how long the rebuild took
    """

    events: int = 0
    undecodable: int = 0
    refused: int = 0
    tasks: int = 0
    missing: int = 0
    differing: int = 0
    extra: int = 0
    recorded: int = 0
    older: int = 0
    kept: int = 0
    partial: int = 0
    lines_missing: int = 0
    lines_differing: int = 0
    lines_extra: int = 0
    bodies: int = 0
    deliveries: int = 0
    swapped: bool = False
    locked_ms: int = 0
    seconds: float = 0.0
    samples: list[RowDifference] = field(default_factory=list)
    gone: list[TopicGap] = field(default_factory=list)

    @property
    def rows_equal(self) -> bool:
        """Whether tasks and timelines are what the topics fold to."""
        return not (self.missing or self.differing or self.lines_missing or self.lines_differing)

    @property
    def equal(self) -> bool:
        """Whether tasks and timelines are what the topics fold to, and no body or delivery is missing."""
        return self.rows_equal and not (self.bodies or self.deliveries)
