"""Compares when each line of a task's timeline is in the database with when Watch streamed it."""

from __future__ import annotations

import threading
import time

from services.common.database.bulk import placeholders
from services.common.database.engine import make_engine
from services.common.database.transactions import transaction

__all__ = ["LIFE", "Sample"]

LIFE = ["created", "mx_ok", "sent"]
_SAMPLED = 20


class Sample(threading.Thread):
    """Reads the timelines of every so many tasks, again and again, to see when each line is there."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._engine = make_engine(url)
        self._open: dict[bytes, set[str]] = {}
        self._streamed: dict[tuple[bytes, str], float] = {}
        self._folded: dict[tuple[bytes, str], float] = {}
        self.stopping = False

    def streamed(self, id_: str, kind: str, now: float) -> None:
        key = bytes.fromhex(id_.replace("-", ""))
        if key[-1] % _SAMPLED == 0:
            # The api itself writes the first line.
            if kind == "created":
                self._open[key] = set(LIFE[1:])
            else:
                self._streamed[key, kind] = now

    def run(self) -> None:
        while not self.stopping:
            ids = list(self._open)
            if ids:
                self._look(ids)
            time.sleep(0.004)

    def behind(self) -> list[float]:
        """Seconds from a line in the database to its watch message; below 0 if the watcher was first."""
        return [at - self._folded[key] for key, at in self._streamed.items() if key in self._folded]

    def _look(self, ids: list[bytes]) -> None:
        lines = "SELECT task_id, kind FROM task_events WHERE kind <> 'created' AND task_id IN"
        sql = f"{lines} ({placeholders(len(ids))})"
        rows = transaction(self._engine, lambda c: c.exec_driver_sql(sql, tuple(ids)).all())
        now = time.time()
        for id_, kind in rows:
            key = bytes(id_)
            self._folded.setdefault((key, kind), now)
            left = self._open.get(key, set())
            left.discard(kind)
            if not left:
                self._open.pop(key, None)
