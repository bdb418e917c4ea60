"""List on tables so large that a scan shows, and paging while rows arrive."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import grpc
import pytest
from sqlalchemy import Connection, Engine

from postroad.v1.task_service_pb2 import BatchCreateRequest, ListRequest
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.api import queries, uuid7
from services.api.filters import Filter
from services.common.database.bulk import execute_rows
from services.common.database.engine import make_engine
from services.common.database.times import from_micros
from services.common.database.transactions import transaction
from services.common.fold import TaskRow
from services.common.statuses import STATUSES
from tests.api_process import ApiProcess, Installation, request
from tests.forms import by_form
from tests.reflection_client import ReflectionClient
from tests.stack import Infra

Labels = dict[str, str]
Table = tuple[Engine, list[tuple[TaskRow, Labels]]]

ROWS = by_form(10_000, 100_000)
FIRST_US = 1_790_000_000_000_000
STEP_US = 1000
CREATE, LIST = "postroad.v1.TaskService/Create", "postroad.v1.TaskService/List"
BATCH_CREATE = "postroad.v1.TaskService/BatchCreate"


def row(number: int, chance: random.Random) -> TaskRow:
    us = FIRST_US + number * STEP_US
    id_, at = uuid7.IdGenerator(lambda: us * 1000).new()
    # As in production nearly all tasks are completed. Others are few, and mostly recent.
    rare = chance.random() < 0.002 or number > ROWS - 40
    status = chance.choice(STATUSES) if rare else "completed"
    domain = "rare.test" if number % 10_000 == 7 else f"d{number % 50}.test"
    labels = {"campaign": f"c{number % 100}", "x": 'a"b', "city": ("Köln", "\U0001f4ee 李")[number % 4 // 2]}
    return TaskRow(
        id=id_,
        tenant="other" if number % 1000 == 3 else "default",
        idempotency_key=None,
        request_hash=None,
        recipient=f"user{number % 5000}@{domain}",
        domain=domain,
        subject=f"number {number}",
        labels=json.dumps(labels) if number % 2 else None,
        created_at=from_micros(at),
        status=status,
        version=1,
        epoch=0,
        attempts=number % 3,
        next_attempt_at=from_micros(at) + timedelta(seconds=60) if number % 7 == 0 else None,
        reason="null_mx" if status == "failed" else "",
        reply="250 ok",
        message_id="<x@y>",
        updated_at=from_micros(at),
    )


@pytest.fixture(scope="module", params=["mysql", "mariadb"])
def large(request: pytest.FixtureRequest) -> Iterator[Table]:
    server: Infra = request.getfixturevalue("infra" if request.param == "mysql" else "mariadb")
    url = server.migrated_database()
    engine = make_engine(url)
    chance = random.Random(1)
    rows = [row(number, chance) for number in range(ROWS)]
    head = f"INSERT INTO tasks ({', '.join(TaskRow._fields)}) VALUES"
    transaction(engine, lambda connection: execute_rows(connection, head, rows, limit=2000))
    with engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE TABLE tasks").all()
    yield engine, [(row, json.loads(row.labels or "{}")) for row in rows]
    engine.dispose()


def name(filter_: Filter) -> str:
    """Return a filter as a test's name."""
    given = [f"{field}={value}" for field, value in asdict(filter_).items() if value not in (None, ())]
    return " ".join(given) or "everything"


def matches(row: TaskRow, labels: Labels, tenant: str, filter_: Filter) -> bool:
    return (
        row.tenant == tenant
        and (not filter_.status or row.status in filter_.status)
        and filter_.email in (None, row.recipient)
        and filter_.domain in (None, row.domain)
        and filter_.reason in (None, row.reason)
        and all(labels.get(key) == value for key, value in filter_.labels)
        and (filter_.created_from is None or row.created_at >= from_micros(filter_.created_from))
        and (filter_.created_to is None or row.created_at < from_micros(filter_.created_to))
    )


# One task in a thousand belongs to the other tenant.
TENANTS = ["default", "other"]
MIDDLE = FIRST_US + ROWS // 2 * STEP_US
FILTERS = [
    Filter(),
    *(Filter(status=(status,)) for status in STATUSES),
    Filter(status=("cancelled", "failed", "uncertain")),
    Filter(status=STATUSES),
    Filter(email="user7@d7.test"),
    Filter(email="nobody@d7.test"),
    Filter(email="user7@d7.test", status=("pending", "completed")),
    Filter(email="user3@d3.test"),
    Filter(reason="null_mx"),
    Filter(domain="rare.test"),
    Filter(domain="d3.test", status=("failed",)),
    Filter(status=("failed",), reason="null_mx"),
    Filter(status=("failed",), reason="rejected"),
    Filter(labels=(("campaign", "c1"), ("x", 'a"b'))),
    Filter(labels=(("campaign", "c1' OR 1=1 -- "),)),
    Filter(labels=(("campaign", "c1"), ("city", "Köln"))),
    Filter(labels=(("city", "\U0001f4ee 李"),), domain="d3.test"),
    Filter(created_from=MIDDLE),
    Filter(created_to=MIDDLE),
    Filter(created_from=MIDDLE - 1, created_to=MIDDLE + 1),
    Filter(created_from=MIDDLE, created_to=MIDDLE),
    Filter(created_from=MIDDLE, created_to=MIDDLE + 50_000_000, status=("completed",)),
    Filter(created_from=-(10**18), created_to=10**18),
    Filter(
        status=("failed", "cancelled"),
        email="user7@d7.test",
        domain="d7.test",
        reason="null_mx",
        labels=(("campaign", "c7"),),
        created_from=FIRST_US,
        created_to=MIDDLE,
    ),
    Filter(
        status=("completed", "failed"),
        email="user2507@d7.test",
        domain="d7.test",
        reason="",
        labels=(("campaign", "c7"), ("x", 'a"b')),
        created_from=MIDDLE,
        created_to=MIDDLE + 40_000_000,
    ),
]


@pytest.mark.parametrize("tenant", TENANTS)
@pytest.mark.parametrize("filter_", FILTERS, ids=name)
def test_pages_show_all_selected_tasks_newest_first(large: Table, filter_: Filter, tenant: str) -> None:
    engine, rows = large
    expected = [uuid7.text(row.id) for row, labels in reversed(rows) if matches(row, labels, tenant, filter_)]
    found: list[str] = []
    after = None
    # Of a large result only the first pages are read. Another test reads to the end.
    while len(found) < 3000:
        tasks, after = transaction(
            engine, lambda c, after=after: queries.page(c, tenant, filter_, after, 700)
        )
        found += [task.id for task in tasks]
        assert bool(after) == (len(found) < len(expected))
        if after is None:
            break
    assert found == expected[: len(found)]


@pytest.mark.parametrize("tenant", TENANTS)
@pytest.mark.parametrize("filter_", FILTERS, ids=name)
def test_a_count_equals_what_pages_show(large: Table, filter_: Filter, tenant: str) -> None:
    engine, rows = large
    expected = Counter(row.status for row, labels in rows if matches(row, labels, tenant, filter_))
    found = transaction(engine, lambda c: queries.count(c, tenant, filter_))
    assert found == {status: expected[status] for status in filter_.status or STATUSES}


COUNTS = [
    (Filter(), "tasks_by_status", ROWS),
    (Filter(status=("failed", "uncertain")), "tasks_by_status", 300),
    (Filter(status=("failed",), reason="null_mx"), "tasks_by_status", 300),
    (Filter(created_from=MIDDLE, created_to=MIDDLE + 1_000_000), "tasks_by_status", 1100),
    (Filter(email="user7@d7.test"), "tasks_by_recipient", 100),
    (Filter(domain="rare.test", labels=(("campaign", "c7"),)), "tasks_by_domain", 100),
    (Filter(domain="d3.test", status=("failed",)), "tasks_by_domain", ROWS // 50 + 100),
]


@pytest.mark.parametrize(
    ("filter_", "index", "most"), COUNTS, ids=lambda value: name(value) if isinstance(value, Filter) else ""
)
def test_a_count_reads_only_what_it_counts(large: Table, filter_: Filter, index: str, most: int) -> None:
    engine, _ = large
    sql, parameters = queries.count_statement("default", filter_)
    with engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN FORMAT=TRADITIONAL {sql}", parameters).mappings().one()
        assert plan["key"] == index
        if index == "tasks_by_status" and filter_.reason is None:
            assert "Using index" in plan["Extra"], plan
        assert reads(connection, sql, parameters) <= most


def reads(connection: Connection, sql: str, parameters: Sequence[Any]) -> int:
    """Return how many rows the server read for an answer."""
    connection.exec_driver_sql("FLUSH STATUS")
    connection.exec_driver_sql(sql, tuple(parameters)).all()
    status = connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'").all()
    return sum(int(count) for _, count in status)


WALKS = [
    Filter(),
    *(Filter(status=(status,)) for status in STATUSES),
    Filter(status=("cancelled", "failed", "uncertain")),
    Filter(status=STATUSES),
    Filter(email="user7@d7.test"),
    Filter(domain="rare.test"),
    Filter(domain="d3.test"),
    Filter(created_to=FIRST_US + 1000 * STEP_US),
    Filter(created_to=FIRST_US + 1000 * STEP_US, status=("completed",)),
]


@pytest.mark.parametrize("tenant", TENANTS)
@pytest.mark.parametrize("depth", [0, ROWS // 2, ROWS - 200])
@pytest.mark.parametrize("filter_", WALKS, ids=name)
def test_any_page_reads_a_few_rows_of_its_index(
    large: Table, filter_: Filter, depth: int, tenant: str
) -> None:
    engine, rows = large
    after = rows[-1 - depth][0].id if depth else None
    sql, parameters = queries.list_statement(tenant, filter_, after, 51)
    walks = 1 if filter_.email or filter_.domain else len(filter_.status or STATUSES)
    with engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN FORMAT=TRADITIONAL {sql}", parameters).mappings().all()
        tables = [step for step in plan if step["table"] == "tasks"]
        assert len(tables) == walks
        for step in tables:
            assert step["type"] in ("range", "index", "ref"), plan
            assert "filesort" not in (step["Extra"] or ""), plan
        touched = reads(connection, sql, parameters)
    # 51 rows of each walk, their merge, and the ends of the ranges.
    assert touched <= 51 * walks * 3 + 60


FEW = [
    Filter(),
    Filter(reason="nowhere"),
    Filter(labels=(("campaign", "nowhere"),)),
    Filter(email="user3@d3.test", reason="nowhere"),
    Filter(domain="d3.test"),
    Filter(domain="d3.test", status=("failed",), labels=(("campaign", "nowhere"),)),
    Filter(created_to=MIDDLE, reason="nowhere"),
]


@pytest.mark.parametrize("filter_", FEW, ids=name)
def test_a_tenant_with_few_tasks_reads_only_those(large: Table, filter_: Filter) -> None:
    engine, _ = large
    own = ROWS // 1000
    with engine.connect() as connection:
        for sql, parameters in (
            queries.list_statement("other", filter_, None, own + 1),
            queries.count_statement("other", filter_),
        ):
            # The rows, the merge of the walks, which MariaDB copies and sorts, and the ends of the ranges.
            assert reads(connection, sql, parameters) <= 7 * own + 60, sql


def test_paging_misses_and_repeats_no_task_while_new_ones_arrive(infra: Infra) -> None:
    with (
        ApiProcess(Installation(infra)) as api,
        ReflectionClient(api.target) as client,
        ThreadPoolExecutor(4) as threads,
    ):

        def asked(number: int) -> dict[str, Any]:
            return {"data": {"email": f"u{number}@shop.test", "subject": "s", "body": ""}}

        results = client.call(BATCH_CREATE, {"requests": [asked(n) for n in range(1000)]})["results"]
        before = {result["task"]["id"] for result in results}
        found: list[str] = []
        token = ""
        for number in range(100):
            arriving = [threads.submit(client.call, CREATE, asked(number)) for _ in range(4)]
            page = client.call(
                LIST, {"page_size": 50, "page_token": token, "_filters": {"status": "pending"}}
            )
            found += [task["id"] for task in page["results"]]
            for future in arriving:
                future.result()
            token = page.get("next_page_token", "")
            if not token:
                break
        assert token == ""
        assert len(found) == len(set(found))
        assert before <= set(found)
        assert found == sorted(found, reverse=True)
        # A token is refused under another filter.
        first = client.call(LIST, {"page_size": 1, "status": ["pending"]})
        for other in ({}, {"status": ["failed"]}, {"email": "a@b.test"}):
            with pytest.raises(Exception, match="page_token"):
                client.call(LIST, other | {"page_token": first["next_page_token"]})
        same = client.call(LIST, {"page_token": first["next_page_token"], "_filters": {"status": "pending"}})
        assert len(same["results"]) == 50
        assert len(client.call(LIST, {"page_size": 5000})["results"]) == 1000


def test_a_page_of_large_tasks_stays_below_the_clients_limit(infra: Infra) -> None:
    labels = {f"{n:060}": "v" * 250 for n in range(64)}
    with ApiProcess(Installation(infra)) as api, grpc.insecure_channel(api.target) as channel:
        tasks = TaskServiceStub(channel)
        batch = BatchCreateRequest(requests=[request(n, labels=labels) for n in range(240)])
        ids = [result.task.id for result in tasks.BatchCreate(batch, timeout=20).results]
        found: list[str] = []
        asked = ListRequest(page_size=1000)
        while not found or asked.page_token:
            # The client refuses a response above 4 MiB, as it does by default.
            page = tasks.List(asked, timeout=20)
            found += [task.id for task in page.results]
            asked.page_token = page.next_page_token
        assert found == ids[::-1]
