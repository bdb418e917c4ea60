"""The files of a run, with one JSON value a line: the history, and what was collected at the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["History", "load", "save"]


class History:
    """Writes `history.jsonl`; safe from any thread.

    Each line has `t` (seconds since the start), `at` (seconds since the Unix epoch) and `what`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self.entries: list[dict[str, Any]] = []

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._start

    def write(self, what: str, **fields: Any) -> dict[str, Any]:
        """Write a line and return it."""
        entry = {"t": round(self.now(), 3), "at": round(time.time(), 3), "what": what, **fields}
        with self._lock:
            self.entries.append(entry)
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        return entry

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def save(path: Path, rows: Iterable[Any]) -> None:
    """Write each row as a line of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(path: Path) -> list[Any]:
    """Return the values that `save` or a History wrote."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
