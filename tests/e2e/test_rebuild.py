"""The task table is lost while the services run: a rebuild restores it, and no mail goes out twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from services.common.database.engine import make_engine
from tests import forked
from tests.e2e.pipeline import Pipeline, until
from tests.e2e.test_kills import Load
from tests.forms import by_form
from tests.stack import Stack

TASKS = by_form(60, 400)
ENDS = ("user@d{}.ok.test", "reject5+{}@good.test", "user{}@nullmx.test", "greylist+{}@good.test")


def rebuilt(stack: Stack, *arguments: str, code: int = 0) -> dict[str, Any]:
    environment = {"POSTROAD_ENV_FILE": str(stack.directory / "stack.env"), "PATH": "/usr/bin:/bin"}
    ended, out, err = forked.run("services.cli", ["rebuild", "-o", "json", *arguments], environment)
    assert ended == code, out + err
    return json.loads(out)  # type: ignore[no-any-return]


def rows(engine: Engine, query: str) -> dict[Any, Any]:
    """Rows by their first two columns."""
    with engine.connect() as connection:
        return {tuple(row[:2]): tuple(row) for row in connection.exec_driver_sql(query)}


def dump(engine: Engine) -> dict[str, dict[Any, Any]]:
    return {table: rows(engine, f"SELECT * FROM {table}") for table in ("tasks", "task_events", "deliveries")}


def one(engine: Engine, query: str) -> Any:
    with engine.connect() as connection:
        return connection.exec_driver_sql(query).scalar()


@pytest.mark.timeout(600)
def test_rebuild_restores_lost_tables_while_tasks_arrive(new_stack: Callable[..., Stack]) -> None:
    stack = new_stack(POSTROAD_SENDER_DELAYS="1,2", POSTROAD_VALIDATOR_DELAYS="1,2")
    stack.up()
    engine = make_engine(stack.env()["POSTROAD_DATABASE_URL"])
    with Pipeline(stack) as pipeline:
        emails = [ENDS[n % 4].format(n) for n in range(TASKS)]
        ids = pipeline.create_many(emails, "before")
        pipeline.settled(ids, 90)
        until(lambda: not any(pipeline.lag().values()), "all committed", 30)
        until(lambda: not one(engine, "SELECT COUNT(*) FROM outbox"), "all published", 30)
        before = dump(engine)
        assert len(before["tasks"]) == TASKS
        assert rebuilt(stack)["differing"] == 0

        with engine.begin() as connection:
            for table in ("tasks", "task_events", "task_bodies", "deliveries"):
                connection.exec_driver_sql(f"TRUNCATE {table}")
        with Load(pipeline, "meanwhile") as load:
            until(lambda: len(load.ids) > 20, "tasks arrive")
            count = len(load.ids)
            report = rebuilt(stack, "--yes")
            assert report["swapped"]
            assert report["missing"] >= TASKS
            until(lambda: len(load.ids) > count + 30, "tasks go on arriving")
        tasks = pipeline.settled(load.ids, 90)
        assert {task.status for task in tasks.values()} == {"completed"}
        pipeline.sent_once(load.ids)
        after = dump(engine)
        for table in ("tasks", "task_events"):
            assert {key: after[table].get(key) for key in before[table]} == before[table]
        lost = before["deliveries"].keys() - after["deliveries"].keys()
        assert not lost, Counter(state for _, state in lost)
        assert len(after["tasks"]) == TASKS + len(load.ids)
        assert rebuilt(stack)["differing"] == 0

        # The senders read every record again, and find each mail sent.
        sent = pipeline.copies(ids)
        victim = ids[0].replace("-", "")
        with engine.begin() as connection:
            connection.exec_driver_sql(
                f"UPDATE tasks SET status = 'failed', reply = 'x' WHERE id = 0x{victim}"
            )
        found = rebuilt(stack, code=1)
        assert (found["differing"], found["missing"], found["swapped"]) == (1, 0, False)
        assert {(s["task"], tuple(s["columns"])) for s in found["samples"]} == {(ids[0], ("status", "reply"))}
        assert rebuilt(stack, "--yes")["swapped"]
        assert pipeline.get(ids[0]).status == "completed"
        assert pipeline.copies(ids) == sent
    engine.dispose()
