"""The lag of stages, measured again and again. Blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from services.common.config import Settings
from services.common.database.engine import make_engine
from services.common.database.transactions import transaction
from services.common.operations.database_url import database_url
from services.common.operations.lag.domains import read_domains
from services.common.operations.lag.report import report
from services.common.operations.lag.sampler import LagSample, LagSampler
from services.common.unpublished import unpublished

__all__ = ["LagMonitor", "outbox_lag"]

_DATABASE_SECONDS = 5
"""Seconds that one answer of the database may take: while it hangs, Kafka's figures are still wanted."""


class LagMonitor:
    """Measures the lag of these stages. A context manager.

    With `domains` a measurement has the `domains` of the mails that the sender has not committed. With
    `outbox` it has `outbox`, the events that the api has not published. Where the database does not answer
    for `outbox`, that is None and `outbox_error` is the error: Kafka's figures need no database.

    Raises NotFound where a topic of a stage does not exist, and InvalidDatabaseUrl.
    """

    def __init__(
        self, settings: Settings, stages: Sequence[str], *, domains: bool = False, outbox: bool = False
    ) -> None:
        self._settings, self._stages = settings, stages
        self._domains, self._outbox = domains, outbox
        self._before: LagSample | None = None
        self._stack = ExitStack()
        self.outbox_error: Exception | None = None

    def __enter__(self) -> LagMonitor:
        with ExitStack() as stack:
            self._sampler = stack.enter_context(LagSampler(self._settings, self._stages))
            self._engine: Engine | None = None
            if self._domains or self._outbox:
                url = database_url(self._settings)
                self._engine = make_engine(url, pool_size=1, read_seconds=_DATABASE_SECONDS)
                stack.callback(self._engine.dispose)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self) -> None:
        """Take the sample from which the first measurement's rates are counted. Raises as `measure`."""
        self._before = self._sampler.sample(offsets_only=True)

    def measure(self, *, partitions: bool = False) -> dict[str, Any]:
        """Return the report of a new sample. Its rates are counted from the sample before.

        Raises `confluent_kafka.KafkaException` and, for domains, `sqlalchemy.exc.DBAPIError`.
        """
        now = self._sampler.sample()
        found = report(self._sampler.reads, now, self._before, partitions=partitions)
        if self._engine is not None and self._domains:
            found["domains"] = read_domains(self._settings, self._engine, now)
        elif self._engine is not None:
            found["outbox"] = self._measure_outbox(self._engine)
        self._before = now
        return found

    def _measure_outbox(self, engine: Engine) -> dict[str, Any] | None:
        self.outbox_error = None
        try:
            return outbox_lag(engine)
        except (SQLAlchemyError, OSError) as error:
            self.outbox_error = error
            return None


def outbox_lag(engine: Engine) -> dict[str, Any]:
    """Return `due`, how many events should be published by now, and `oldest_due_seconds`.

    Raises `sqlalchemy.exc.DBAPIError`.
    """
    found = transaction(engine, unpublished)
    return {"due": found.due, "oldest_due_seconds": round(found.oldest_seconds, 3) if found.due else None}
