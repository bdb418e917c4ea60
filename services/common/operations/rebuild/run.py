"""A rebuild from its first step to its last. Blocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from services.common import topic_ids
from services.common.config import Settings
from services.common.database.engine import make_engine
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.kafka.admin import admin_client
from services.common.kafka.topics import EVENT_TOPICS, KEEP_DAYS, Names
from services.common.operations.database_url import database_url
from services.common.operations.errors import OperationError
from services.common.operations.rebuild import copy_rows, diff, writer
from services.common.operations.rebuild.event_reader import EventReader
from services.common.operations.rebuild.gaps import find_gaps, oldest_complete_id, truncated_topics
from services.common.operations.rebuild.report import RebuildProgress, RebuildReport
from services.common.operations.rebuild.shadow_table import (
    BODIES,
    DELIVERIES,
    EVENTS,
    SHADOW_TABLES,
    STEP,
    TASKS,
    ShadowTable,
    TaskRange,
    analyse,
    create_tables,
    drop_tables,
    ranges,
)
from services.common.operations.rebuild.swap_tables import swap

__all__ = ["RebuildRunning", "rebuild"]

R = TypeVar("R")

_QUERY_SECONDS = 120
# One session holds the rebuild's lock for all its time, and sends nothing else.
_SILENT_SECONDS = 8 * 3600
# A stage's batch may still hold the event that makes a row equal. The rebuild looks again every _LOOK_AGAIN
# seconds, and stops after _SETTLE seconds in which no row became equal.
_SETTLE, _LOOK_AGAIN = 3.0, 0.25
# How long the swap waits for a silent Kafka while all writers wait (seconds).
_SILENCE = 5.0
_SAMPLES = 10


class RebuildRunning(OperationError):
    """Another rebuild of the same tables runs."""


def rebuild(settings: Settings, swap_in: bool, progress: RebuildProgress) -> RebuildReport:
    """Fold all event topics into shadow tables, compare them with the originals, and maybe swap them.

    Tables that differ are swapped where `swap_in` is true. The services may run meanwhile. Without `swap_in`
    the originals, the bodies and the deliveries stay as they are. The rebuild drops its tables at the end. If
    it is killed, the next one drops them. Raises RebuildRunning, `swap_tables.TableBusy`, InvalidDatabaseUrl,
    NotFound, `sqlalchemy.exc.DBAPIError` and `confluent_kafka.KafkaException`.
    """
    started = time.monotonic()
    engine = make_engine(
        database_url(settings), pool_size=6, read_seconds=_QUERY_SECONDS, silent_seconds=_SILENT_SECONDS
    )
    try:
        with _only_rebuild(engine), _Rebuild(settings, engine, progress) as run:
            report = run.report
            run.fold()
            run.find_deliveries(swap_in)
            run.copy_rows()
            run.compare()
            run.find_gaps()
            run.find_bodies(swap_in)
            if swap_in and not report.rows_equal:
                run.swap()
            run.count_events()
            report.seconds = time.monotonic() - started
            return report
    finally:
        engine.dispose()


@contextmanager
def _only_rebuild(engine: Engine) -> Iterator[None]:
    """Hold a lock that ends with its session. Raises RebuildRunning where another rebuild holds it."""
    with engine.connect() as connection:
        name = "CONCAT('postroad.rebuild.', LEFT(SHA2(DATABASE(), 256), 32))"
        if connection.exec_driver_sql(f"SELECT GET_LOCK({name}, 0)").scalar() != 1:
            raise RebuildRunning("another rebuild of these tables is under way")
        try:
            yield
        finally:
            with suppress(DBAPIError):
                connection.exec_driver_sql(f"SELECT RELEASE_LOCK({name})")


class _Rebuild:
    """The steps of one rebuild.

    A context manager that creates the shadow tables and drops them at the end.
    """

    def __init__(self, settings: Settings, engine: Engine, progress: RebuildProgress) -> None:
        self._engine, self._progress = engine, progress
        self._retention_us = settings.body_retention * 1_000_000
        # Without the setting, the services may delete bodies sooner than its default says.
        self._retention_given = "body_retention" in settings.model_fields_set
        self._names = Names(settings.topic_prefix)
        self._admin = admin_client(settings)
        self._reader = EventReader(settings, engine, progress.advance)
        self._gap_entries: Counter[str] = Counter()
        self.report = RebuildReport()

    def __enter__(self) -> _Rebuild:
        self._transact(create_tables)
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._transact(drop_tables)

    def fold(self) -> None:
        """Fold what the topics hold now, and then what arrived meanwhile."""
        ends = self._reader.topics.ends()
        self._progress.total(self._reader.topics.left(ends))
        self._progress.note("folding the topics")
        self._reader.fold(ends)
        self._reader.catch_up()

    # --- copy and compare ------------------------------------------------------------------------

    def copy_rows(self) -> None:
        """Copy the rows that no topic holds: those of unpublished and of older tasks."""
        self._progress.note("copying rows")
        self.report.recorded = self._copy_unpublished()
        oldest = oldest_complete_id(truncated_topics(self._reader.topics))
        if oldest is None:
            return
        for range_ in self._ranges(TASKS.original, TASKS.task_id):
            inside = range_.high is not None and range_.high <= oldest
            part = range_ if inside else TaskRange(range_.low, oldest)
            rows, _ = self._transact(partial(copy_rows.copy_older, range_=part))
            self.report.older += rows
            if not inside:
                return

    def _copy_unpublished(self) -> int:
        self._transact(partial(copy_rows.copy_unpublished, table=EVENTS))
        return self._transact(partial(copy_rows.copy_unpublished, table=TASKS))

    def compare(self) -> None:
        """Compare every row, until the differences last."""
        self._progress.note("comparing")
        for table in SHADOW_TABLES:
            for name in (table.name, table.original):
                for range_ in self._ranges(name, table.task_id):
                    self._transact(partial(diff.record_differences, table=table, range_=range_))
        self._await_settled()
        self._keep_gap_rows()
        tasks, entries = (
            self._transact(partial(diff.count_differences, table=table)) for table in SHADOW_TABLES
        )
        report = self.report
        report.missing, report.differing, report.extra = tasks["missing"], tasks["differs"], tasks["extra"]
        report.lines_missing, report.lines_differing = entries["missing"], entries["differs"]
        report.lines_extra = entries["extra"]
        for table in SHADOW_TABLES:
            report.samples += self._transact(partial(diff.sample_differences, table=table, most=_SAMPLES))
        for table in SHADOW_TABLES:
            for range_ in self._ranges(table.differences, table.task_id):
                self._transact(partial(copy_rows.copy_unknown, table=table, range_=range_))
        count = f"SELECT COUNT(*), COUNT(created_at) FROM {TASKS.name}"
        all_, created = self._transact(lambda connection: connection.exec_driver_sql(count).one())
        report.tasks, report.partial = int(all_), int(all_ - created)

    def _keep_gap_rows(self) -> None:
        """Keep the rows of the originals that fall into gaps of the topics."""
        for range_ in self._ranges(EVENTS.differences, EVENTS.task_id):
            self._gap_entries += self._transact(partial(copy_rows.count_gap_entries, range_=range_))
        for range_ in self._ranges(TASKS.differences, TASKS.task_id):
            self._transact(partial(copy_rows.keep_key_owners, range_=range_))
        differing = self._transact(partial(diff.remove_equal, table=TASKS))
        for range_ in self._ranges(TASKS.differences, TASKS.task_id):
            self._transact(partial(copy_rows.merge_incomplete_rows, range_=range_))
        self.report.kept = differing - self._transact(partial(diff.remove_equal, table=TASKS))

    def _await_settled(self) -> None:
        """Return once no row differs, or once no further row becomes equal."""
        least, deadline = 1 << 62, time.monotonic() + _SETTLE
        while True:
            self._reader.catch_up()
            self._copy_unpublished()
            left = sum(self._transact(partial(diff.remove_equal, table=table)) for table in SHADOW_TABLES)
            if left < least:
                least, deadline = left, time.monotonic() + _SETTLE
            if not left or time.monotonic() > deadline:
                return
            self._progress.note(f"{left} rows differ, comparing them again")
            time.sleep(_LOOK_AGAIN)

    def find_gaps(self) -> None:
        """Report the topics that do not hold all that they once held."""
        ids = topic_ids.topic_ids(self._admin, [self._names.topic(topic) for topic in EVENT_TOPICS])
        self._transact(partial(topic_ids.note, ids=ids))
        recreated = self._transact(partial(topic_ids.recreated, ids=ids, days=KEEP_DAYS))
        # Without older tasks in the table, the topics lost nothing of it.
        truncated = truncated_topics(self._reader.topics) if self.report.older else {}
        self.report.gone = find_gaps(self._names, recreated, truncated, self._gap_entries)

    def count_events(self) -> None:
        """Report how many events were read."""
        self.report.events = self._reader.events
        self.report.undecodable = self._reader.undecodable
        self.report.refused = len(self._reader.refused)

    # --- change ----------------------------------------------------------------------------------

    def find_deliveries(self, restore: bool) -> None:
        """Count the missing deliveries, or restore them: early, since senders ask for them."""
        self._progress.note("deliveries")
        for range_ in self._ranges(EVENTS.original, EVENTS.task_id):
            self._transact(partial(writer.add_sent_by_timelines, range_=range_))
        act = writer.restore_deliveries if restore else writer.count_missing_deliveries
        for range_ in self._ranges(DELIVERIES, "task_id"):
            self.report.deliveries += self._transact(partial(act, range_=range_))

    def find_bodies(self, restore: bool) -> None:
        """Count the missing bodies, or restore them."""
        self._progress.note("bodies")
        purged = from_micros(time.time_ns() // 1000 - self._retention_us) if self._retention_us else None
        act = partial(
            writer.restore_bodies if restore else writer.count_missing_bodies,
            purged_before=purged,
            trust_tasks=not self._retention_given,
        )
        for range_ in self._ranges(BODIES, "task_id", 200):
            self.report.bodies += self._transact(partial(act, range_=range_))

    def swap(self) -> None:
        """Put the shadow tables in the originals' place, one after the other."""
        self._progress.note("swapping")
        for table in SHADOW_TABLES:
            self._transact(partial(analyse, table=table))
        self._reader.catch_up()
        self._reader.topics.silence = _SILENCE
        here = dict(self._reader.topics.next)
        for table in SHADOW_TABLES:
            # Each table reads what arrives from here on.
            self._reader.topics.next = dict(here)
            swap(self._engine, table, partial(self._bring_up_to_date, table))
        self.report.swapped = True

    def _bring_up_to_date(self, table: ShadowTable, connection: Connection) -> None:
        """Fold and copy what arrived last. The original is locked, so that nothing is lacking afterwards.

        An event leaves the outbox only after it is on its topic. So the locked outbox, and the topics up to
        their ends from then on, together hold all events.
        """
        started = time.monotonic()
        for folded in self._reader.batches(self._reader.topics.ends()):
            if table is TASKS:
                writer.write_rows(connection, folded.rows)
            else:
                writer.write_entries(connection, folded.entries.values())
        copy_rows.copy_unpublished(connection, table)
        self.report.locked_ms += round((time.monotonic() - started) * 1000)

    def _transact(self, work: Callable[[Connection], R]) -> R:
        return transaction(self._engine, work)

    def _ranges(self, table: str, column: str, step: int = STEP) -> Iterator[TaskRange]:
        with self._engine.connect() as connection:
            yield from ranges(connection, table, column, step)
