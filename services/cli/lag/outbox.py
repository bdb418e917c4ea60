"""Asks the database what the api has recorded and not published. Blocks."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from services.cli.database import url_of
from services.cli.errors import explain
from services.cli.terminal import say
from services.common.config import Settings
from services.common.database.engine import make_engine
from services.common.database.transactions import transaction
from services.common.unpublished import unpublished

__all__ = ["Outbox"]

_PATIENCE = 5
"""Seconds that one answer may take: while the database hangs, Kafka's figures are still wanted."""


class Outbox:
    """Counts what is due; a context manager. Trouble is told on stderr, once for each kind, and not raised:
    Kafka's part of the answer needs no database.
    """

    def __init__(self, settings: Settings) -> None:
        self.engine = make_engine(url_of(settings), pool_size=1, read_seconds=_PATIENCE)
        self._said = ""

    def __enter__(self) -> Outbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.dispose()

    def ask(self) -> dict[str, Any] | None:
        """Return `due`, how many events should be published, and `oldest_due_seconds`; None in trouble."""
        try:
            found = transaction(self.engine, unpublished)
        except Exception as error:
            failure = explain(error)
            if failure is None:
                raise
            if failure.line != self._said:
                self._said = failure.line
                say(f"postroad: the outbox is not shown: {failure.line}")
            return None
        self._said = ""
        return {"due": found.due, "oldest_due_seconds": round(found.oldest_seconds, 3) if found.due else None}
