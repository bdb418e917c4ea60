"""Which changes may be told now, and what a task looks like after each. Pure: the caller brings the time.

A change whose needs were not read yet is held: for `SURE` seconds where they must still come, since the
task was made after reading began, or its first attempt is told long after that (a task that was scheduled);
and for `MAYBE` where they may have come before. The last tasks are remembered; of those that are not, an
event may be told again.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable
from datetime import datetime

from services.api.watch.changes import Change, Place, Step, age
from services.common.fold import TaskRow, merge

__all__ = ["MAYBE", "SURE", "Book", "Mail"]

Mail = tuple[str, None, None, str, str, str, str | None, datetime]
"""What a Row says of the mail, in its order, without idempotency key and hash."""

SURE, MAYBE = 2.0, 0.08
_MOST = 20_000
_CLEARLY_MS = 30_000
"""From here on after the start of reading a first attempt's needs are taken to come after it too."""


class _Life:
    """What was read of one task."""

    __slots__ = ("keys", "row", "steps")

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.steps: set[Step] = set()
        self.row: TaskRow | None = None


class Book:
    """The `most` tasks last read of. Those made after `began_ms` (Unix) are read of from their start."""

    def __init__(self, began_ms: int, most: int = _MOST) -> None:
        self._start, self._began, self._most = began_ms, began_ms, most
        self._lives: OrderedDict[bytes, _Life] = OrderedDict()
        self._held: dict[bytes, list[tuple[Change, float]]] = {}

    def read(self, changes: Iterable[Change], now: float) -> list[Change]:
        """Take what was read, and return what may be told: each task's in order, no event twice.

        `now` is in seconds, of a clock that never goes back.
        """
        told: list[Change] = []
        for change in sorted(changes, key=_by_task):
            id_ = change.row.id
            life = self._life(id_)
            if change.entry.event_id in life.keys:
                continue
            life.keys.add(change.entry.event_id)
            if id_ not in self._held and life.steps.issuperset(change.needs):
                life.steps.add(change.step)
                told.append(change)
            else:
                held = self._held.setdefault(id_, [])
                insort(held, (change, now + self._patience(change, life)), key=_oldest)
                told += self._release(id_, now)
        for id_ in [id_ for id_, held in self._held.items() if held[0][1] <= now]:
            told += self._release(id_, now)
        self._forget()
        return told

    def due(self) -> float | None:
        """Return when the next held change is to be told whatever comes; None where none is held."""
        return min((held[0][1] for held in self._held.values()), default=None)

    def held(self) -> list[tuple[Place, int]]:
        """Return where the changes stand that are held: partition and offset."""
        return [(change.place, change.offset) for held in self._held.values() for change, _ in held]

    def strangers(self, changes: Iterable[Change]) -> list[Change]:
        """Return those of tasks of which nothing else is known, and that do not begin here."""
        strange: dict[bytes, bool] = {}
        found = []
        for change in changes:
            id_ = change.row.id
            if id_ not in strange:
                life = self._lives.get(id_)
                known = life is not None and life.row is not None and life.row.created_at is not None
                strange[id_] = not known and (change.replayed or change.entry.kind != "created")
            if strange[id_]:
                found.append(change)
        return found

    def after(self, change: Change, mail: Mail | None) -> TaskRow | None:
        """Return the task as it is after the change, None where nobody knows whose it is.

        `mail` is what the database says of a stranger. To be called once a change, in the order of `read`.
        """
        row = change.row if mail is None else TaskRow._make((change.row.id, *mail, *change.row[9:]))
        life = self._lives.get(row.id)
        if life is None:
            return row if row.tenant is not None else None
        if life.row is None:
            life.row = row
        else:
            # What an epoch that is over still tells changes nothing, nor does the validator once it has found
            # another answer, or the sender has the task: the task is shown as it stands.
            late = change.entry.stage == "validator" and change.entry.kind != "mx_ok"
            stands = row.version >= life.row.version or row.epoch < life.row.epoch or late
            life.row = merge(life.row, row)
            # Told late within its epoch, it is told as it was then.
            row = life.row if stands else TaskRow._make((row.id, *life.row[1:9], *row[9:]))
        return row if row.tenant is not None else None

    def _life(self, id_: bytes) -> _Life:
        life = self._lives.get(id_)
        if life is None:
            life = self._lives[id_] = _Life()
        else:
            self._lives.move_to_end(id_)
        return life

    def _patience(self, change: Change, life: _Life) -> float:
        missing = [step for step in change.needs if step not in life.steps]
        sure = any(self._made(change.row.id, epoch) > self._began for _, epoch, _ in missing)
        # An id's time is when the task was made, which is long before it is published where it is scheduled.
        young = change.at_ms > self._start + _CLEARLY_MS
        first = all(epoch == change.row.epoch and not attempt for _, epoch, attempt in missing)
        return SURE if sure or (young and first) else MAYBE

    def _release(self, id_: bytes, now: float) -> list[Change]:
        """Return what may be told of a task; never one before an older one that is held."""
        life, held = self._life(id_), self._held[id_]
        told: list[Change] = []
        for change, due in held:
            if due > now and not life.steps.issuperset(change.needs):
                break
            # What was waited for in vain is not waited for again.
            life.steps.update((change.step, *change.needs))
            told.append(change)
        del held[: len(told)]
        if not held:
            del self._held[id_]
        return told

    def _forget(self) -> None:
        while len(self._lives) > self._most:
            id_, life = self._lives.popitem(last=False)
            # Of tasks as old as this one no longer everything is known.
            epoch = life.row.epoch if life.row is not None else 0
            self._began = max(self._began, self._made(id_, epoch))

    @staticmethod
    def _made(id_: bytes, epoch: int) -> int:
        """Return when a task was made or reopened, Unix ms: a UUIDv7 begins with its time."""
        return epoch or int.from_bytes(id_[:6], "big")


def _by_task(change: Change) -> tuple[bytes, tuple[int, int]]:
    return change.row.id, age(change)


def _oldest(held: tuple[Change, float]) -> tuple[int, int]:
    return age(held[0])
