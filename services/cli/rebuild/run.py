"""A rebuild from beginning to end. Blocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Literal, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from services.cli.database import url_of
from services.cli.kafka import admin
from services.cli.rebuild.carrying import carry_found, carry_older, carry_recorded
from services.cli.rebuild.comparing import Difference, Kind, count, note, samples, strike_off
from services.cli.rebuild.feeding import Feed
from services.cli.rebuild.keeping import keep_owners_of_keys, keep_rows, lacking
from services.cli.rebuild.pairs import (
    BODIES,
    DELIVERIES,
    EVENTS,
    PAIRS,
    STEP,
    TASKS,
    Pair,
    Range,
    analyse,
    create,
    drop,
    ranges,
)
from services.cli.rebuild.swapping import swap
from services.cli.rebuild.writing import (
    body_rows,
    delivery_rows,
    missing_bodies,
    missing_deliveries,
    sent_by_timelines,
    write_lines,
    write_rows,
)
from services.common import topic_ids
from services.common.config import Settings
from services.common.database.engine import make_engine
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.kafka.topics import EVENT_TOPICS, KEEP_DAYS, Names

__all__ = ["Gone", "Report", "Steps", "Underway", "rebuild"]

R = TypeVar("R")

_QUERY_SECONDS = 120
# One session says all the while that a rebuild is under way, and nothing else.
_SILENT_SECONDS = 8 * 3600
# A row that differs may be on its way through a stage's batches; how long it is watched without any
# of them becoming equal, and how often (seconds).
_SETTLE, _LOOK_AGAIN = 3.0, 0.25
# How long Kafka may keep everybody waiting (seconds).
_SILENCE = 5.0
# The clocks of those who make ids and records may be so far apart.
_SKEW_MS = 60_000
_SAMPLES = 10


class Underway(RuntimeError):
    """Another rebuild of the same tables runs."""


class Steps(Protocol):
    """Who is told how far it is."""

    def total(self, events: int) -> None: ...

    def advance(self, events: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Gone:
    """A topic (bare name) that does not hold all that it once held, as far as that can be seen.

    `recreated`: it has another id than before, first seen at `since`. `truncated`: its oldest records are
    gone, by its retention or by hand; it holds all from `since` on. `lacks`: only timelines tell.
    `records`: so many of their lines stand for records that it lacks, those of older tasks not counted.
    Times are naive UTC.
    """

    topic: str
    cause: Literal["recreated", "truncated", "lacks"]
    records: int
    since: datetime | None = None


@dataclass(slots=True)
class Report:
    """What a rebuild found, and what it did. Rows of `tasks` where nothing else is said.

    `missing`: in the topics and not in the table; `differing`: not equal in some column; `extra`: in the
    table, and the topics know nothing of them though they hold their time. `recorded`: not published yet
    (scheduled, say); `older`: than what the topics hold; both, like the extra ones, are carried over as
    they are. `kept`: they know more than the topics, which lack records (`gone`); they stay as they are.
    `partial`: neither the topics nor the table know more of them than what came after `task.created`.
    `lines_*` are the same for timelines. `bodies` and `deliveries` were missing.
    """

    events: int = 0
    undecodable: int = 0
    refused: int = 0
    tasks: int = 0
    missing: int = 0
    differing: int = 0
    extra: int = 0
    recorded: int = 0
    older: int = 0
    kept: int = 0
    partial: int = 0
    lines_missing: int = 0
    lines_differing: int = 0
    lines_extra: int = 0
    bodies: int = 0
    deliveries: int = 0
    swapped: bool = False
    locked_ms: int = 0
    seconds: float = 0.0
    samples: list[Difference] = field(default_factory=list)
    gone: list[Gone] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether the tables are what the topics make of them, and nothing is missing."""
        return not (
            self.missing
            or self.differing
            or self.lines_missing
            or self.lines_differing
            or self.bodies
            or self.deliveries
        )


def rebuild(settings: Settings, swap_in: bool, steps: Steps) -> Report:
    """Fold all event topics into tables beside the originals, compare, and with `swap_in` exchange them.

    The services may run. Without `swap_in` the originals, the bodies and the deliveries stay as they are.
    What is made beside them is dropped in the end; a rebuild that was killed leaves it to the next one.
    Raises Underway, `swapping.Busy`, `sqlalchemy.exc.DBAPIError` and `confluent_kafka.KafkaException`.
    """
    started = time.monotonic()
    engine = make_engine(
        url_of(settings), pool_size=6, read_seconds=_QUERY_SECONDS, silent_seconds=_SILENT_SECONDS
    )
    try:
        with _alone(engine), _Rebuild(settings, engine, steps) as run:
            report = run.report
            run.fold()
            run.deliveries(swap_in)
            run.carry()
            run.compare()
            run.recognise()
            run.bodies(swap_in)
            if swap_in and (
                report.missing or report.differing or report.lines_missing or report.lines_differing
            ):
                run.swap()
            run.count()
            report.seconds = time.monotonic() - started
            return report
    finally:
        engine.dispose()


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """Hold a lock that goes with its session."""
    with engine.connect() as connection:
        name = "CONCAT('postroad.rebuild.', LEFT(SHA2(DATABASE(), 256), 32))"
        if connection.exec_driver_sql(f"SELECT GET_LOCK({name}, 0)").scalar() != 1:
            raise Underway("another rebuild of these tables is under way")
        try:
            yield
        finally:
            with suppress(DBAPIError):
                connection.exec_driver_sql(f"SELECT RELEASE_LOCK({name})")


class _Rebuild:
    def __init__(self, settings: Settings, engine: Engine, steps: Steps) -> None:
        self._engine, self._steps = engine, steps
        self._retention_us = settings.body_retention * 1_000_000
        # Without the setting, the services may delete bodies sooner than its default says.
        self._retention_given = "body_retention" in settings.model_fields_set
        self._names = Names(settings.topic_prefix)
        self._admin = admin(settings)
        self._feed = Feed(settings, engine, steps.advance)
        self._lacking: Counter[str] = Counter()
        self.report = Report()

    def __enter__(self) -> _Rebuild:
        self._now(create)
        return self

    def __exit__(self, *_: object) -> None:
        self._feed.close()
        self._now(drop)

    def fold(self) -> None:
        """Fold what is on the topics now, and then what came meanwhile."""
        ends = self._feed.log.ends()
        self._steps.total(self._feed.log.left(ends))
        self._steps.note("folding the topics")
        self._feed.fold(ends)
        self._feed.catch_up()

    # --- carry over, compare ---------------------------------------------------------------------

    def carry(self) -> None:
        """Carry over what no topic holds."""
        self._steps.note("carrying over")
        self.report.recorded = self._carry_recorded()
        oldest = self._oldest()
        if oldest is None:
            return
        for range_ in self._ranges(TASKS.name, TASKS.id):
            bound = range_.high is not None and range_.high <= oldest
            rows, _ = self._now(partial(carry_older, range_=range_ if bound else Range(range_.low, oldest)))
            self.report.older += rows
            if not bound:
                return

    def _carry_recorded(self) -> int:
        self._now(partial(carry_recorded, pair=EVENTS))
        return self._now(partial(carry_recorded, pair=TASKS))

    def _oldest(self) -> bytes | None:
        """Return the id below which a task may have had events that the topics hold no more, if any."""
        if not (shortened := self._shortened()):
            return None
        since = max(shortened.values()) + _SKEW_MS
        return (since << 80).to_bytes(16)  # a UUIDv7 begins with 48 bits of milliseconds

    def _shortened(self) -> dict[str, int]:
        """Return the topics (full names) that lost old records, and since when (ms) they hold all."""
        now = time.time_ns() // 1_000_000
        since: dict[str, int] = {}
        for at, offset in self._feed.log.start.items():
            if offset > 0:
                since[at.topic] = max(since.get(at.topic, 0), self._feed.log.first_ms.get(at, now))
        return since

    def compare(self) -> None:
        """Compare every row, until those that differ do so for good."""
        self._steps.note("comparing")
        for pair in PAIRS:
            for table in (pair.shadow, pair.name):
                for range_ in self._ranges(table, pair.id):
                    self._now(partial(note, pair=pair, range_=range_))
        self._await_settled()
        self._keep()
        tasks, lines = (self._now(partial(count, pair=pair)) for pair in PAIRS)
        report = self.report
        report.missing, report.differing, report.extra = _three(tasks)
        report.lines_missing, report.lines_differing, report.lines_extra = _three(lines)
        for pair in PAIRS:
            report.samples += self._now(partial(samples, pair=pair, most=_SAMPLES))
        for pair in PAIRS:
            for range_ in self._ranges(pair.found, pair.id):
                self._now(partial(carry_found, pair=pair, range_=range_))
        tasks_known = f"SELECT COUNT(*), COUNT(created_at) FROM {TASKS.shadow}"
        all_, known = self._now(lambda c: c.exec_driver_sql(tasks_known).one())
        report.tasks, report.partial = int(all_), int(all_ - known)

    def _keep(self) -> None:
        """Keep what the originals know and the topics do not hold."""
        for range_ in self._ranges(EVENTS.found, EVENTS.id):
            self._lacking += self._now(partial(lacking, range_=range_))
        for range_ in self._ranges(TASKS.found, TASKS.id):
            self._now(partial(keep_owners_of_keys, range_=range_))
        differing = self._now(partial(strike_off, pair=TASKS))
        for range_ in self._ranges(TASKS.found, TASKS.id):
            self._now(partial(keep_rows, range_=range_))
        self.report.kept = differing - self._now(partial(strike_off, pair=TASKS))

    def _await_settled(self) -> None:
        least, deadline = 1 << 62, time.monotonic() + _SETTLE
        while True:
            self._feed.catch_up()
            self._carry_recorded()
            left = sum(self._now(partial(strike_off, pair=pair)) for pair in PAIRS)
            if left < least:
                least, deadline = left, time.monotonic() + _SETTLE
            if not left or time.monotonic() > deadline:
                return
            self._steps.note(f"{left} rows differ, watching them")
            time.sleep(_LOOK_AGAIN)

    # --- change ----------------------------------------------------------------------------------

    def deliveries(self, restore: bool) -> None:
        """Count the deliveries that are missing, or restore them: early, since senders ask for them."""
        self._steps.note("deliveries")
        for range_ in self._ranges(EVENTS.name, EVENTS.id):
            self._now(partial(sent_by_timelines, range_=range_))
        act = delivery_rows if restore else missing_deliveries
        for range_ in self._ranges(DELIVERIES, "task_id"):
            self.report.deliveries += self._now(partial(act, range_=range_))

    def bodies(self, restore: bool) -> None:
        """Count the bodies that are missing, or restore them."""
        self._steps.note("bodies")
        purged = from_micros(time.time_ns() // 1000 - self._retention_us) if self._retention_us else None
        act = partial(
            body_rows if restore else missing_bodies,
            purged_before=purged,
            trust_tasks=not self._retention_given,
        )
        for range_ in self._ranges(BODIES, "task_id", 200):
            self.report.bodies += self._now(partial(act, range_=range_))

    def swap(self) -> None:
        """Put the rebuilt tables in the originals' place, one after the other."""
        self._steps.note("swapping")
        for pair in PAIRS:
            # Whoever plans a query on the new table knows what is in it.
            self._now(partial(analyse, pair=pair))
        self._feed.catch_up()
        self._feed.log.silence = _SILENCE
        here = dict(self._feed.log.next)
        for pair in PAIRS:
            # What comes from here on is read anew for each.
            self._feed.log.next = dict(here)
            swap(self._engine, pair, partial(self._bring_up, pair))
        self.report.swapped = True

    def recognise(self) -> None:
        """Note which topics do not hold all that they once held."""
        ids = topic_ids.topic_ids(self._admin, [self._names.topic(topic) for topic in EVENT_TOPICS])
        self._now(partial(topic_ids.note, ids=ids))
        recreated = self._now(partial(topic_ids.recreated, ids=ids, days=KEEP_DAYS))
        shortened = self._shortened() if self.report.older else {}
        for topic in EVENT_TOPICS:
            name, records = self._names.topic(topic), self._lacking[topic]
            if name in recreated:
                self.report.gone.append(Gone(topic, "recreated", records, recreated[name]))
            elif name in shortened:
                since = from_micros(1000 * shortened[name])
                self.report.gone.append(Gone(topic, "truncated", records, since))
            elif records:
                self.report.gone.append(Gone(topic, "lacks", records))

    def count(self) -> None:
        """Note what was read."""
        self.report.events = self._feed.events
        self.report.undecodable = self._feed.undecodable
        self.report.refused = len(self._feed.refused)

    def _bring_up(self, pair: Pair, connection: Connection) -> None:
        """Fold and carry over what came last: the original does not move now, and then nothing is lacking.

        An event that was published has left the outbox only after it was on its topic; so the outbox, as it
        is locked, and the topics, as they end after that, together hold all.
        """
        started = time.monotonic()
        for folded in self._feed.batches(self._feed.log.ends()):
            if pair is TASKS:
                write_rows(connection, folded.rows)
            else:
                write_lines(connection, folded.entries.values())
        carry_recorded(connection, pair)
        self.report.locked_ms += round((time.monotonic() - started) * 1000)

    def _now(self, work: Callable[[Connection], R]) -> R:
        return transaction(self._engine, work)

    def _ranges(self, table: str, column: str, step: int = STEP) -> Iterator[Range]:
        with self._engine.connect() as connection:
            yield from ranges(connection, table, column, step)


def _three(counted: Counter[Kind]) -> tuple[int, int, int]:
    return counted["missing"], counted["differs"], counted["extra"]
