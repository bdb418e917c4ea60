"""Tasks are lost from the tables while the services run: a rebuild restores them, no mail goes out twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from services.common.database.engine import make_engine
from tests import forked
from tests.e2e.load import Load
from tests.e2e.pipeline import Pipeline, until
from tests.forms import by_form
from tests.stack import Stack

TASKS = by_form(24, 400)
ENDS = ("user@d{}.ok.test", "reject5+{}@good.test", "user{}@nullmx.test", "greylist+rebuild{}@good.test")
# By the column with a task's id.
TABLES = {"tasks": "id", "task_events": "task_id", "task_bodies": "task_id", "deliveries": "task_id"}


def rebuilt(stack: Stack, *arguments: str) -> dict[str, Any]:
    environment = {"POSTROAD_ENV_FILE": str(stack.directory / "stack.env"), "PATH": "/usr/bin:/bin"}
    ended, out, err = forked.run("services.cli", ["rebuild", "-o", "json", *arguments], environment)
    assert ended == 0, out + err
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.fixture
def engine(stack: Stack) -> Iterator[Engine]:
    engine = make_engine(stack.database)
    yield engine
    engine.dispose()


def dump(engine: Engine, first: str) -> dict[str, dict[Any, Any]]:
    """Return the rows of the tasks from this id on, by table and by their first two columns."""
    found = {}
    with engine.connect() as connection:
        for table, column in TABLES.items():
            query = f"SELECT * FROM {table} WHERE {column} >= 0x{first}"
            found[table] = {tuple(row[:2]): tuple(row) for row in connection.exec_driver_sql(query)}
    return found


@pytest.mark.timeout(600)
def test_rebuild_restores_lost_tasks_while_others_arrive(stack: Stack, engine: Engine) -> None:
    with Pipeline(stack) as pipeline:
        emails = [ENDS[n % 4].format(n) for n in range(TASKS)]
        ids = pipeline.create_many(emails, "before")
        pipeline.settled(ids, 90)
        until(lambda: not any(pipeline.lag().values()), "all committed")
        first = min(ids).replace("-", "")
        before = dump(engine, first)
        assert len(before["tasks"]) == TASKS

        with engine.begin() as connection:
            for table, column in TABLES.items():
                connection.exec_driver_sql(f"DELETE FROM {table} WHERE {column} >= 0x{first}")
        with Load(pipeline, "meanwhile", rate=10) as load:
            until(lambda: len(load.ids) > 10, "tasks arrive")
            report = rebuilt(stack, "--yes")
            assert report["swapped"]
            assert report["missing"] >= TASKS
            count = len(load.ids)
            until(lambda: len(load.ids) > count + 10, "tasks go on arriving")
        tasks = pipeline.settled(load.ids, 90)
        assert {task.status for task in tasks.values()} == {"completed"}
        pipeline.sent_once([*load.ids, *ids[::4]])
        after = dump(engine, first)
        for table in ("tasks", "task_events"):
            assert {key: after[table].get(key) for key in before[table]} == before[table]
        lost = before["deliveries"].keys() - after["deliveries"].keys()
        assert not lost, Counter(state for _, state in lost)
        assert len(after["tasks"]) == TASKS + len(load.ids)
