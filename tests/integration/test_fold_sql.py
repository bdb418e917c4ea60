"""The tables hold the fold, whatever the order, the batches and the repetitions, and whoever wrote them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine

from services.common.database.engine import make_engine
from services.common.database.transactions import transaction
from services.common.events import Event, task_id
from services.common.fold import TaskRow, delta, fold
from services.common.merge_events import merge_events
from services.common.taskstore import insert_events, insert_timeline, upsert
from services.common.timeline import TimelineRow, timeline_row
from tests.event_strategies import histories
from tests.forms import by_form

on_a_server = settings(
    max_examples=by_form(50, 300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=["mysql", "mariadb"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """One database for all examples."""
    url = request.getfixturevalue("infra" if request.param == "mysql" else "mariadb").migrated_database()
    engine = make_engine(url)
    yield engine
    engine.dispose()


def clear(connection: Connection) -> None:
    connection.exec_driver_sql("DELETE FROM tasks")
    connection.exec_driver_sql("DELETE FROM task_events")


def store(engine: Engine, events: list[Event], rng: random.Random) -> None:
    """Store as the api and a rebuild do, or as the status service does."""
    merges = rng.random() < 0.6

    def write(connection: Connection) -> None:
        if merges:
            merge_events(connection, events)
            insert_timeline(connection, events)
        else:
            upsert(connection, [delta(event) for event in events])
            insert_events(connection, [timeline_row(event) for event in events])

    transaction(engine, write)


def stored(connection: Connection) -> dict[bytes, TaskRow]:
    rows = connection.exec_driver_sql(f"SELECT {', '.join(TaskRow._fields)} FROM tasks")
    found = {}
    for row in rows:
        values = [bytes(value) if isinstance(value, bytearray) else value for value in row]
        found[values[0]] = TaskRow._make(values)
    return found


def plain(row: TaskRow) -> TaskRow:
    # MySQL writes JSON in its own form, with the same meaning.
    return row._replace(labels=None if row.labels is None else "some")


def folded(events: list[Event]) -> dict[bytes, TaskRow]:
    rows: dict[bytes, TaskRow] = {}
    for event in events:
        rows[task_id(event)] = fold(rows.get(task_id(event)), event)
    return rows


def batches(events: list[Event], rng: random.Random) -> Iterator[list[Event]]:
    while events:
        size = rng.randint(1, len(events))
        yield events[:size]
        events = events[size:]


@on_a_server
@given(histories(3, 14), st.randoms(use_true_random=False))
def test_any_split_into_batches_stores_the_fold(
    engine: Engine, events: list[Event], rng: random.Random
) -> None:
    transaction(engine, clear)
    for batch in batches(events, rng):
        store(engine, batch, rng)
    with engine.connect() as connection:
        found = stored(connection)
    assert {id_: plain(row) for id_, row in found.items()} == {
        id_: plain(row) for id_, row in folded(events).items()
    }


@on_a_server
@given(histories(3, 10), st.randoms(use_true_random=False))
def test_any_order_with_duplicates_stores_the_same(
    engine: Engine, events: list[Event], rng: random.Random
) -> None:
    seen: dict[tuple[bytes, int], Event] = {}
    for event in events:  # of events with one version the first counts
        seen.setdefault((task_id(event), delta(event).version), event)
    once = list(seen.values())
    transaction(engine, clear)
    again = [*once, *rng.choices(once, k=rng.randrange(6))]
    rng.shuffle(again)
    for batch in batches(again, rng):
        store(engine, batch, rng)
    with engine.connect() as connection:
        found = stored(connection)
    assert {id_: plain(row) for id_, row in found.items()} == {
        id_: plain(row) for id_, row in folded(once).items()
    }


@settings(on_a_server, max_examples=by_form(20, 50))
@given(histories(3, 10))
def test_the_timeline_holds_each_event_once(engine: Engine, events: list[Event]) -> None:
    transaction(engine, clear)
    rng = random.Random(len(events))
    for batch in (events, events[::-1]):
        store(engine, batch, rng)
    with engine.connect() as connection:
        found = [
            TimelineRow._make([bytes(row[0]), *row[1:]])
            for row in connection.exec_driver_sql(f"SELECT {', '.join(TimelineRow._fields)} FROM task_events")
        ]
    wanted: dict[tuple[bytes, str], list[TimelineRow]] = {}
    for event in events:
        line = timeline_row(event)
        wanted.setdefault((line.task_id, line.event_id), []).append(line)
    assert {(line.task_id, line.event_id) for line in found} == set(wanted)
    assert all(line in wanted[line.task_id, line.event_id] for line in found)
