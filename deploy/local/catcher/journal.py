"""The journal of accepted mail: one JSON object a line, on disk before the catcher replies 250.

    {"message_id": "<...>", "rcpt": "a@b.test", "mail_from": "...", "at": 1.7e9, "size": 512, "path": ""}

Each recipient has a line. `at` is in seconds since the epoch, `size` in bytes without dot-stuffing. All
sessions share one fdatasync: a thread writes all that came while the last one ran. The .eml files are written
before their lines and not synced: the journal is the proof, the files are for readers.
"""

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

__all__ = ["Item", "Journal"]

_MESSAGE_ID = re.compile(rb"^message-id:\s*(\S+)", re.IGNORECASE | re.MULTILINE)

# The sender, the recipients, the message, and the callback for the result.
Item = tuple[str, list[str], bytes, Callable[[bool], None]]


class Journal:
    """Keeps mail under `directory`. Made and used on the loop's thread."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory.absolute()
        self._file = os.open(directory / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._queue: SimpleQueue[Item | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._prefix = f"{time.time_ns() // 1_000_000:x}"
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def add(self, item: Item) -> None:
        """Store a message. Its callback gets True on the loop once it is on disk, False if that failed."""
        self._queue.put(item)

    def close(self) -> None:
        """Write what was added, and end. Blocks until then."""
        self._queue.put(None)
        self._thread.join()
        os.close(self._file)

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            batch: list[Item] = []
            while item is not None:
                batch.append(item)
                if self._queue.empty():
                    break
                item = self._queue.get()
            kept = bool(batch) and self._keep(batch)
            if batch:
                self._loop.call_soon_threadsafe(_tell, [done for *_, done in batch], kept)
            if item is None:
                return

    def _keep(self, batch: list[Item]) -> bool:
        try:
            lines = "".join(self._lines(*item[:3]) for item in batch).encode()
            if os.write(self._file, lines) != len(lines):
                raise OSError("short write")
            os.fdatasync(self._file)
        except OSError as error:
            print(f"journal: {error}", flush=True)
            return False
        return True

    def _lines(self, mail_from: str, recipients: list[str], message: bytes) -> str:
        self._count += 1
        path = f"{self._directory}/{self._prefix}-{self._count:06}.eml"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(file, message)
        finally:
            os.close(file)
        found = _MESSAGE_ID.search(message, 0, message.find(b"\r\n\r\n") + 1 or len(message))
        entry = {
            "message_id": found[1].decode("utf-8", "replace") if found else "",
            "rcpt": "",
            "mail_from": mail_from,
            "at": time.time(),
            "size": len(message),
            "path": path,
        }
        return "".join(json.dumps({**entry, "rcpt": rcpt}) + "\n" for rcpt in recipients)


def _tell(callbacks: list[Callable[[bool], None]], kept: bool) -> None:
    for done in callbacks:
        done(kept)
