"""How many bytes a statement may have.

A server takes no statement above its `max_allowed_packet`, and may drop the session without a word: a client
hears the same when the server goes away. So each session asks for that size, and a statement above it is not
sent. The driver has its text whole by then, so the check costs next to nothing.

A proxy may take less than the server behind it, and drop the session too. A long statement that lost its
session is a hint: from then on a statement with several rows is half as long. A hint may be wrong, so one
that cannot be shortened is always sent if the server takes it. It counts as too long where it loses its
session again and again while none as long passes: nobody is to try it for ever.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mysql.connector import Error
from mysql.connector.errors import DataError

__all__ = [
    "LONG_STATEMENT",
    "PACKET_TOO_LARGE",
    "SESSION_LOST",
    "StatementLimits",
    "StatementTooLong",
    "max_row_bytes",
    "max_statement_bytes",
    "split_by_bytes",
]

LONG_STATEMENT = 1 << 20
"""Bytes. A session that is lost in a statement no longer than this was not lost for its length."""
SESSION_LOST = frozenset({2006, 2013, 2055})
"""The client's errors for a session that is gone."""
PACKET_TOO_LARGE = 1153
"""ER_NET_PACKET_TOO_LARGE: the server refuses the statement, and drops the session."""

# What a packet holds besides the statement, generously.
_MARGIN = 1024
# Losses that show that a statement is too long, and the seconds between the first and the last of them.
_LOSSES, _SECONDS = 5, 20.0
# How long a hint is believed (seconds): an operator may have widened what was too narrow.
_MEMORY = 600.0


class StatementTooLong(DataError):
    """A statement that cannot be executed, for its length: its data is to blame.

    Unless it was `sent`, its session is as it was.
    """

    def __init__(self, size: int, most: int, *, sent: bool = False) -> None:
        takes = f"less than {most}" if sent else str(most)
        text = f"a statement has {size} bytes, the database takes {takes} (max_allowed_packet)"
        super().__init__(msg=text, errno=PACKET_TOO_LARGE)
        self.sent = sent


class StatementLimits:
    """The bounds of one engine's statements. Safe from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # When statements of how many bytes lost their sessions; none so long has passed since.
        self._losses: deque[tuple[float, int]] = deque(maxlen=50)
        self._share: tuple[int, float] | None = None
        self._thread = threading.local()

    def share(self) -> int | None:
        """Return the bytes that a statement with several rows may have; None: what the server takes."""
        share = self._share
        return share[0] if share is not None and self._clock() < share[1] else None

    @contextmanager
    def several(self) -> Iterator[None]:
        """Say that what this thread sends meanwhile has several rows: its caller can make two of it."""
        self._thread.several = True
        try:
            yield
        finally:
            self._thread.several = False

    def lost(self, size: int) -> bool:
        """Note that a session was lost in a statement of more than LONG bytes.

        Return whether as many losses of such statements, for as long, show that it is too long.
        """
        with self._lock:
            now, share = self._clock(), self.share()
            if share is None or size <= share:
                self._share = max(LONG_STATEMENT, size // 2), now + _MEMORY
            self._losses.append((now, size))
            shorter = [at for at, lost in self._losses if lost <= size and now - at < _MEMORY]
            return len(shorter) >= _LOSSES and now - shorter[0] >= _SECONDS

    def refused(self, size: int) -> None:
        """Note that the server said of a statement with several rows that it is too large."""
        with self._lock:
            self._share = size // 2, self._clock() + _MEMORY

    def passed(self, size: int) -> None:
        """Note that a statement of more than LONG bytes was answered."""
        with self._lock:
            kept = [loss for loss in self._losses if loss[1] > size]
            self._losses.clear()
            self._losses.extend(kept)

    def guard(self, connection: Any, server: int) -> None:
        """Have a driver's connection refuse statements that are too long, and note what becomes of long ones.

        `server` is the session's `max_allowed_packet` in bytes.
        """
        # The connection is not to hold itself: it would outlive its session until a garbage collection.
        itself, send = weakref.proxy(connection), type(connection).cmd_query
        bound = max_statement_bytes(server)

        def cmd_query(query: bytes | str, *options: Any, **named: Any) -> Any:
            size, several = len(query), getattr(self._thread, "several", False)
            if size > bound:
                raise StatementTooLong(size, bound)
            try:
                answer = send(itself, query, *options, **named)
            except Error as error:
                too_long = error.errno == PACKET_TOO_LARGE
                if too_long and several:
                    self.refused(size)
                elif size > LONG_STATEMENT and error.errno in SESSION_LOST:
                    too_long = self.lost(size)
                if too_long and not several:
                    raise StatementTooLong(size, size, sent=True) from error
                raise
            if size > LONG_STATEMENT:
                self.passed(size)
            return answer

        connection.cmd_query = cmd_query


def max_statement_bytes(server: int) -> int:
    """Return the bytes that any statement may have, given the server's `max_allowed_packet`."""
    return max(server - _MARGIN, server // 2)


def max_row_bytes(row: Iterable[object]) -> int:
    """Return a bound of the bytes that a row's values take in a statement."""
    size = 8
    for value in row:
        # Quotes, a comma, and any number or time in full.
        size += 40
        if isinstance(value, str):
            # Any ASCII character may be escaped by another; no other one is, and UTF-8 takes 4 bytes at most.
            size += (2 if value.isascii() else 4) * len(value)
        elif isinstance(value, bytes):
            size += 2 * len(value)
    return size


def split_by_bytes(rows: Sequence[Sequence[object]], share: int) -> Iterator[Sequence[Sequence[object]]]:
    """Yield the rows in runs of at most `share` bytes in a statement; one that is above goes alone."""
    start = size = 0
    for number, row in enumerate(rows):
        added = max_row_bytes(row)
        if number > start and size + added > share:
            yield rows[start:number]
            start, size = number, 0
        size += added
    if start < len(rows):
        yield rows[start:]
