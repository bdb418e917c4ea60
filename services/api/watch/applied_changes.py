"""Applies changes in their order, and makes messages of them for the watchers that select them.

The live reader and catch-ups share it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from services.api.watch import messages
from services.api.watch.changes import Change
from services.api.watch.lookup import KnownTasks
from services.api.watch.messages import WatchMessage
from services.api.watch.reorder_buffer import ReorderBuffer
from services.common.fold import TaskRow
from services.common.kafka.topic_partition import RecordLocation

__all__ = ["AppliedChange", "ChangeApplier", "LookUp", "watch_messages"]

R = TypeVar("R", bound=Hashable)

LookUp: TypeAlias = Callable[[Sequence[Change]], Awaitable[KnownTasks]]
"""Asks the database for the tasks of these changes."""


class AppliedChange(NamedTuple):
    """A change and the task's row after it."""

    change: Change
    row: TaskRow


class ChangeApplier:
    """Applies changes in the order of `buffer`; looks tasks up whose first events were not read."""

    def __init__(self, buffer: ReorderBuffer, look_up: LookUp) -> None:
        self.buffer, self._look_up = buffer, look_up

    async def release(
        self, changes: Iterable[Change], now: float, skip: Collection[RecordLocation] = ()
    ) -> list[AppliedChange]:
        """Add changes to the buffer; return the released ones in order, except those at `skip`.

        Omits events that watchers have certainly received before, and tasks of an unknown tenant. Raises what
        `look_up` raises.
        """
        released = self.buffer.add(changes, now)
        unknown = self.buffer.of_unknown_tasks(released)
        known = await self._look_up(unknown) if unknown else KnownTasks({}, set())
        applied = []
        for change in released:
            if skip and RecordLocation(*change.partition, change.offset) in skip:
                continue
            if (change.row.id, change.entry.event_id) in known.duplicates:
                continue
            row = self.buffer.apply(change, known.mails.get(change.row.id))
            if row is not None:
                applied.append(AppliedChange(change, row))
        return applied


def watch_messages(
    changes: Iterable[AppliedChange], find: Callable[[AppliedChange], Sequence[R]], positions_text: str
) -> Iterator[tuple[R, WatchMessage, bool]]:
    """Yield each receiver's messages for a group of changes, and whether it is the receiver's last one.

    `find` returns the receivers of a change. A client that resumes within the group must read the whole group
    again, so each message carries `positions_text`, that of the positions before the group. For the last
    message of a receiver the caller replaces it by that of the positions after the group.
    """
    last: dict[R, WatchMessage] = {}
    for applied in changes:
        receivers = find(applied)
        if not receivers:
            continue
        entry = applied.change.entry
        message = WatchMessage(messages.change_body(applied.row, entry), positions_text, entry.event_id)
        for receiver in receivers:
            if (previous := last.get(receiver)) is not None:
                yield receiver, previous, False
            last[receiver] = message
    for receiver, message in last.items():
        yield receiver, message, True
