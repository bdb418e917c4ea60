"""How many bytes a statement may have.

A server accepts no statement above its `max_allowed_packet`, and may drop the session instead of refusing.
To a client that looks like a server that went away. So each session asks for the limit, and the client does
not send a longer statement. The driver has the whole text by then, so the check costs next to nothing.

A proxy may accept less than its server, and drop the session too. A session that was lost in a long
statement is a hint. From then on a statement with several rows is at most half as long. The hint may be
wrong, so the client always sends a statement that it cannot shorten, if the server's limit allows it. Such
a statement counts as too long if it loses its session again and again, while none as long succeeds. So no
caller retries it without end.
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
"""Bytes. A session that is lost in a shorter statement was not lost because of its length."""
SESSION_LOST = frozenset({2006, 2013, 2055})
"""The client's errors for a lost session."""
PACKET_TOO_LARGE = 1153
"""ER_NET_PACKET_TOO_LARGE: the server refuses the statement and drops the session."""

# A generous bound of what a packet holds besides the statement (bytes).
_MARGIN = 1024
# This many losses within at least so many seconds show that a statement is too long.
_LOSSES, _SECONDS = 5, 20.0
# A hint is valid for this long (seconds), since an operator may raise the limit.
_MEMORY = 600.0


class StatementTooLong(DataError):
    """A statement is too long to be executed: its data is at fault. Its session is intact unless it was
    `sent`."""

    def __init__(self, size: int, most: int, *, sent: bool = False) -> None:
        takes = f"less than {most}" if sent else str(most)
        text = f"a statement has {size} bytes, the database takes {takes} (max_allowed_packet)"
        super().__init__(msg=text, errno=PACKET_TOO_LARGE)
        self.sent = sent


class StatementLimits:
    """The limits of one engine's statements. Safe on any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Times and bytes of statements that lost their sessions; no statement as long has succeeded since.
        self._losses: deque[tuple[float, int]] = deque(maxlen=50)
        # The bytes that a statement with several rows may have, and until when.
        self._hint: tuple[int, float] | None = None
        self._thread = threading.local()

    def multi_row_bytes(self) -> int | None:
        """Return the bytes that a statement with several rows may have; None: as many as the server takes."""
        hint = self._hint
        return hint[0] if hint is not None and self._clock() < hint[1] else None

    @contextmanager
    def multi_row(self) -> Iterator[None]:
        """Mark this thread's statements as having several rows: their caller can split them."""
        self._thread.multi_row = True
        try:
            yield
        finally:
            self._thread.multi_row = False

    def record_loss(self, size: int) -> bool:
        """Record that a session was lost in a statement of more than LONG_STATEMENT bytes.

        Return whether the losses so far show that the statement is too long.
        """
        with self._lock:
            now, limit = self._clock(), self.multi_row_bytes()
            if limit is None or size <= limit:
                self._hint = max(LONG_STATEMENT, size // 2), now + _MEMORY
            self._losses.append((now, size))
            shorter = [at for at, lost in self._losses if lost <= size and now - at < _MEMORY]
            return len(shorter) >= _LOSSES and now - shorter[0] >= _SECONDS

    def record_refusal(self, size: int) -> None:
        """Record that the server refused a statement with several rows as too large."""
        with self._lock:
            self._hint = size // 2, self._clock() + _MEMORY

    def record_success(self, size: int) -> None:
        """Record that a statement of more than LONG_STATEMENT bytes succeeded."""
        with self._lock:
            kept = [loss for loss in self._losses if loss[1] > size]
            self._losses.clear()
            self._losses.extend(kept)

    def guard(self, connection: Any, server: int) -> None:
        """Have a driver's connection refuse statements that are too long, and record the results of long
        ones.

        `server` is the session's `max_allowed_packet` in bytes.
        """
        # A proxy, since a connection that refers to itself lives on until a garbage collection.
        itself, send = weakref.proxy(connection), type(connection).cmd_query
        bound = max_statement_bytes(server)

        def cmd_query(query: bytes | str, *options: Any, **named: Any) -> Any:
            size, multi_row = len(query), getattr(self._thread, "multi_row", False)
            if size > bound:
                raise StatementTooLong(size, bound)
            try:
                answer = send(itself, query, *options, **named)
            except Error as error:
                too_long = error.errno == PACKET_TOO_LARGE
                if too_long and multi_row:
                    self.record_refusal(size)
                elif size > LONG_STATEMENT and error.errno in SESSION_LOST:
                    too_long = self.record_loss(size)
                if too_long and not multi_row:
                    raise StatementTooLong(size, size, sent=True) from error
                raise
            if size > LONG_STATEMENT:
                self.record_success(size)
            return answer

        connection.cmd_query = cmd_query


def max_statement_bytes(server: int) -> int:
    """Return the bytes that a statement may have, given the server's `max_allowed_packet`."""
    return max(server - _MARGIN, server // 2)


def max_row_bytes(row: Iterable[object]) -> int:
    """Return an upper bound of the bytes of a row in a statement."""
    size = 8
    for value in row:
        # Enough for quotes, a comma, and any number or time.
        size += 40
        if isinstance(value, str):
            # A character has up to 4 bytes in UTF-8. Quotes are doubled, and so is a text with a backslash,
            # which is hexadecimal (literals.py).
            size += (2 if value.isascii() else 8 if "\\" in value else 4) * len(value)
        elif isinstance(value, bytes):
            size += 2 * len(value)
    return size


def split_by_bytes(rows: Sequence[Sequence[object]], limit: int) -> Iterator[Sequence[Sequence[object]]]:
    """Yield the rows in runs of at most `limit` bytes in a statement; a longer row is a run of its own."""
    start = size = 0
    for number, row in enumerate(rows):
        added = max_row_bytes(row)
        if number > start and size + added > limit:
            yield rows[start:number]
            start, size = number, 0
        size += added
    if start < len(rows):
        yield rows[start:]
