"""Releases the changes of each task in their order, and computes the task's row after each. Pure.

The buffer holds a change until its predecessors have been read, or until a timeout:

- `EXPECTED_PREDECESSOR_TIMEOUT` where they must still come. Then the task was created after reading began, or
  the change is a first attempt long after that, as with a scheduled task.
- `POSSIBLE_PREDECESSOR_TIMEOUT` where they may have been published before reading began.

The buffer remembers a limited number of tasks. It may release an event of a forgotten task a second time.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable
from datetime import datetime

from services.api.watch.changes import Change, Step, order_in_task
from services.common.fold import TaskRow, merge
from services.common.kafka.topic_partition import RecordLocation

__all__ = [
    "EXPECTED_PREDECESSOR_TIMEOUT",
    "POSSIBLE_PREDECESSOR_TIMEOUT",
    "MailColumns",
    "ReorderBuffer",
]

MailColumns = tuple[str, None, None, str, str, str, str | None, datetime]
"""The columns of a TaskRow that describe the mail, in its order, without idempotency key and request hash."""

EXPECTED_PREDECESSOR_TIMEOUT, POSSIBLE_PREDECESSOR_TIMEOUT = 2.0, 0.08
_MAX_TASKS = 20_000
_CLEARLY_LATER_MS = 30_000
"""From this long after the start of reading, a first attempt's predecessors too come after the start."""


class TaskHistory:
    """What the buffer has read of one task."""

    __slots__ = ("event_ids", "row", "steps")

    def __init__(self) -> None:
        self.event_ids: set[str] = set()
        self.steps: set[Step] = set()
        self.row: TaskRow | None = None


class ReorderBuffer:
    """Remembers the `max_tasks` tasks that it read last.

    It reads every event of a task that was created after `began_ms` (Unix ms).
    """

    def __init__(self, began_ms: int, max_tasks: int = _MAX_TASKS) -> None:
        self._began_ms, self._complete_after_ms, self._max_tasks = began_ms, began_ms, max_tasks
        self._histories: OrderedDict[bytes, TaskHistory] = OrderedDict()
        self._held: dict[bytes, list[tuple[Change, float]]] = {}

    def add(self, changes: Iterable[Change], now: float) -> list[Change]:
        """Add changes; return those that are released now: each task's in order, no event twice.

        `now` is in seconds of a monotonic clock.
        """
        released: list[Change] = []
        for change in sorted(changes, key=_by_task):
            id_ = change.row.id
            history = self._history(id_)
            if change.entry.event_id in history.event_ids:
                continue
            history.event_ids.add(change.entry.event_id)
            if id_ not in self._held and history.steps.issuperset(change.predecessors):
                history.steps.add(change.step)
                released.append(change)
            else:
                held = self._held.setdefault(id_, [])
                insort(held, (change, now + self._timeout(change, history)), key=_held_order)
                released += self._release(id_, now)
        for id_ in [id_ for id_, held in self._held.items() if held[0][1] <= now]:
            released += self._release(id_, now)
        self._forget()
        return released

    def next_timeout(self) -> float | None:
        """Return the time at which the next held change is released anyway; None where none is held."""
        return min((held[0][1] for held in self._held.values()), default=None)

    def held(self) -> list[RecordLocation]:
        """Return the locations of the held changes."""
        return [
            RecordLocation(*change.partition, change.offset)
            for held in self._held.values()
            for change, _ in held
        ]

    def of_unknown_tasks(self, changes: Iterable[Change]) -> list[Change]:
        """Return the changes of tasks whose first event was not read and is not among these changes."""
        unknown: dict[bytes, bool] = {}
        found = []
        for change in changes:
            id_ = change.row.id
            if id_ not in unknown:
                history = self._histories.get(id_)
                known = history is not None and history.row is not None and history.row.created_at is not None
                unknown[id_] = not known and (change.replayed or change.entry.kind != "created")
            if unknown[id_]:
                found.append(change)
        return found

    def apply(self, change: Change, mail: MailColumns | None) -> TaskRow | None:
        """Return the task's row after the change; None where its tenant is unknown.

        `mail` comes from the database, for a task whose first event was not read. The caller applies each
        released change once, in their order.
        """
        row = change.row if mail is None else TaskRow._make((change.row.id, *mail, *change.row[9:]))
        history = self._histories.get(row.id)
        if history is None:
            return row if row.tenant is not None else None
        if history.row is None:
            history.row = row
        else:
            # An event of an ended epoch changes nothing, and neither does a late verdict of the validator.
            # Its watcher sees the task as it is now.
            late_verdict = change.entry.stage == "validator" and change.entry.kind != "mx_ok"
            current = row.version >= history.row.version or row.epoch < history.row.epoch or late_verdict
            history.row = merge(history.row, row)
            # A change that is late within its epoch shows the task as it was then.
            row = history.row if current else TaskRow._make((row.id, *history.row[1:9], *row[9:]))
        return row if row.tenant is not None else None

    def _history(self, id_: bytes) -> TaskHistory:
        history = self._histories.get(id_)
        if history is None:
            history = self._histories[id_] = TaskHistory()
        else:
            self._histories.move_to_end(id_)
        return history

    def _timeout(self, change: Change, history: TaskHistory) -> float:
        missing = [step for step in change.predecessors if step not in history.steps]
        complete = any(_created_ms(change.row.id, epoch) > self._complete_after_ms for _, epoch, _ in missing)
        # The id of a scheduled task has the time of its creation, long before it is published.
        clearly_later = change.at_ms > self._began_ms + _CLEARLY_LATER_MS
        first = all(epoch == change.row.epoch and not attempt for _, epoch, attempt in missing)
        expected = complete or (clearly_later and first)
        return EXPECTED_PREDECESSOR_TIMEOUT if expected else POSSIBLE_PREDECESSOR_TIMEOUT

    def _release(self, id_: bytes, now: float) -> list[Change]:
        """Release held changes of a task; none before an older one that stays held."""
        history, held = self._history(id_), self._held[id_]
        released: list[Change] = []
        for change, timeout in held:
            if timeout > now and not history.steps.issuperset(change.predecessors):
                break
            # After a timeout no other change waits for the same predecessor again.
            history.steps.update((change.step, *change.predecessors))
            released.append(change)
        del held[: len(released)]
        if not held:
            del self._held[id_]
        return released

    def _forget(self) -> None:
        while len(self._histories) > self._max_tasks:
            id_, history = self._histories.popitem(last=False)
            # The buffer no longer knows all events of tasks as old as this one.
            epoch = history.row.epoch if history.row is not None else 0
            self._complete_after_ms = max(self._complete_after_ms, _created_ms(id_, epoch))


def _created_ms(id_: bytes, epoch: int) -> int:
    """Return when an epoch of a task began (Unix ms). A UUIDv7 begins with the time of its creation."""
    return epoch or int.from_bytes(id_[:6], "big")


def _by_task(change: Change) -> tuple[bytes, tuple[int, int]]:
    return change.row.id, order_in_task(change)


def _held_order(held: tuple[Change, float]) -> tuple[int, int]:
    return order_in_task(held[0])
