"""A batch of records, folded in memory into what is to be written. Pure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from postroad.v1 import events_pb2 as pb
from services.cli.rebuild import deliveries
from services.cli.rebuild.deliveries import Told
from services.common.events import Event
from services.common.fold import TaskRow, delta, merge
from services.common.taskstore import Body, body_of
from services.common.timeline import TimelineEntry, timeline_entry

__all__ = ["Folded"]


class Folded:
    """What a batch of events comes to: a row, a body and a delivery a task, and every line of timelines."""

    def __init__(self) -> None:
        self.rows: dict[bytes, TaskRow] = {}
        self.entries: dict[tuple[bytes, str], TimelineEntry] = {}
        self.bodies: dict[bytes, Body] = {}
        self.told: dict[bytes, Told] = {}

    def add(self, event: Event) -> None:
        """Fold one event. Of two in one version the first one stays, as on the road."""
        row = delta(event)
        id_ = row.id
        known = self.rows.get(id_)
        self.rows[id_] = row if known is None else merge(known, row)
        entry = timeline_entry(event)
        self.entries.setdefault((id_, entry.event_id), entry)
        if isinstance(event, pb.TaskCreated | pb.MxOk):
            if id_ not in self.bodies and (event.task.HasField("body") or event.task.HasField("html")):
                self.bodies[id_] = body_of(event.task)
            return
        told = deliveries.told(event, row.version)
        if told is not None:
            before = self.told.get(id_)
            self.told[id_] = told if before is None else deliveries.merge(before, told)

    def tasks(self) -> set[bytes]:
        """Return the ids of the tasks that anything here is of."""
        return {*self.rows, *(id_ for id_, _ in self.entries), *self.bodies, *self.told}

    def without_rows(self) -> Folded:
        """Return all but the rows."""
        rest = Folded()
        rest.entries, rest.bodies, rest.told = self.entries, self.bodies, self.told
        return rest

    def rows_alone(self) -> Folded:
        """Return the rows, to be gone on with."""
        rest = Folded()
        rest.rows = self.rows
        return rest

    def halves(self) -> tuple[Folded, Folded]:
        """Return this in two parts of about as many tasks each."""
        tasks = self.tasks()
        first = frozenset(islice(tasks, len(tasks) // 2))
        return self._part(lambda id_: id_ in first), self._part(lambda id_: id_ not in first)

    def _part(self, meant: Callable[[bytes], bool]) -> Folded:
        part = Folded()
        part.rows = {id_: row for id_, row in self.rows.items() if meant(id_)}
        part.entries = {key: entry for key, entry in self.entries.items() if meant(key[0])}
        part.bodies = {id_: body for id_, body in self.bodies.items() if meant(id_)}
        part.told = {id_: told for id_, told in self.told.items() if meant(id_)}
        return part
