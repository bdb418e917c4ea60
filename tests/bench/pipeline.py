"""What every measurement stands on: a stack of its own, and the mail server's word for what it took."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.stack import Stack

__all__ = ["Journal", "stack"]

DEADLINE = 120.0


@contextmanager
def stack() -> Iterator[tuple[Path, dict[str, str]]]:
    """A local stack of its own in a temporary folder: its folder and its stack.env."""
    given = {k: v for k, v in os.environ.items() if k.startswith(("POSTROAD_", "EMAIL_"))}
    system = Stack(Path(tempfile.mkdtemp(prefix="postroad-bench-")), given)
    try:
        system.up()
        yield system.directory, system.env()
    finally:
        system.down()


class Journal:
    """The catcher's journal, read on from where it was."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.accepted: dict[str, float] = {}
        self.copies = 0

    def read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            task = entry["message_id"].strip("<>").partition("@")[0]
            self.copies += task in self.accepted
            self.accepted.setdefault(task, float(entry["at"]))

    async def holds(self, tasks: set[str]) -> None:
        """Wait until every one of `tasks` was accepted; raises TimeoutError after the deadline."""
        end = time.monotonic() + DEADLINE
        while True:
            self.read()
            missing = tasks - self.accepted.keys()
            if not missing:
                return
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{len(missing)} of {len(tasks)} tasks were not accepted in {DEADLINE:.0f} s"
                )
            await asyncio.sleep(0.02)
