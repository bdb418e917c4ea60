"""BatchCreate and Count over the wire: each item has its own result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from postroad.v1.task_service_pb2 import BatchCreateRequest, CountRequest, CreateRequest
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.api import uuid7
from services.common.statuses import STATUSES
from tests.api_process import ApiProcess, Installation, eventually, request
from tests.stack import Infra


@pytest.fixture(scope="module")
def installation(infra: Infra) -> Installation:
    return Installation(infra)


@pytest.fixture(scope="module")
def api(installation: Installation) -> Iterator[ApiProcess]:
    with ApiProcess(installation) as process:
        yield process


@pytest.fixture(scope="module")
def tasks(api: ApiProcess) -> Iterator[Any]:
    """A client with the default settings of gRPC."""
    with grpc.insecure_channel(api.target) as channel:
        yield TaskServiceStub(channel)


def published(installation: Installation, label: str) -> Counter[str]:
    """Return how many records each task with this label has on task.created."""
    return Counter(
        uuid7.text(event.task.id) for event, _ in installation.published() if label in event.task.labels
    )


def test_a_thousand_tasks_are_recorded_in_order_and_published(installation: Installation, tasks: Any) -> None:
    labels = {"thousand": ""}
    batch = BatchCreateRequest(requests=[request(n, labels=labels) for n in range(1000)])
    results = tasks.BatchCreate(batch, timeout=20).results
    assert [result.task.email for result in results] == [f"u{n}@shop.test" for n in range(1000)]
    ids = [result.task.id for result in results]
    assert ids == sorted(set(ids))
    eventually(lambda: published(installation, "thousand") == Counter(ids))
    of_batch = {m.partition() for m in installation.records() if uuid7.text(m.key() or b"") in set(ids)}
    assert len(of_batch) == 1, "Kafka answers one produce request for each partition"
    counts = tasks.Count(CountRequest(labels=labels))
    assert counts.total == 1000
    assert counts.counts == {status: 1000 if status == "pending" else 0 for status in STATUSES}
    of_one = CountRequest(email="u7@shop.test", status=["pending"], labels=labels)
    assert tasks.Count(of_one).counts == {"pending": 1}
    assert tasks.Count(CountRequest(domain="shop.test", status=["failed"])).counts == {"failed": 0}
    with pytest.raises(grpc.RpcError) as caught:
        tasks.Count(CountRequest(status=["sent"]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("count", [0, 1001])
def test_an_empty_batch_and_a_too_large_one_are_refused(tasks: Any, count: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        tasks.BatchCreate(BatchCreateRequest(requests=[request(n) for n in range(count)]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("requests: ")


def test_each_item_has_its_own_result(installation: Installation, tasks: Any) -> None:
    def item(number: int, key: str = "", **data: Any) -> CreateRequest:
        return request(number, key, labels={"items": ""}, **data)

    known = tasks.Create(item(1, "known"))
    later = item(9)
    later.send_at.FromJsonString("9999-01-01T00:00:00Z")
    batch = [
        item(1, "known"),
        item(2, "known"),
        item(3, email="", subject=""),
        item(4, "twice"),
        item(4, "twice"),
        item(5, "twice"),
        later,
        item(6),
    ]
    metadata = [("idempotency-key", "of no item")]
    results = tasks.BatchCreate(BatchCreateRequest(requests=batch), metadata=metadata).results
    kinds = [result.WhichOneof("outcome") for result in results]
    assert kinds == ["task", "error", "error", "task", "task", "error", "error", "task"]
    assert results[0].task == known
    first = results[3].task
    assert results[4].task == first
    for place, original in ((1, known), (5, first)):
        error = results[place].error
        assert (error.index, error.code, error.reason) == (place, 6, "IDEMPOTENCY_KEY_REUSED")
        assert error.metadata == {"id": original.id}
    for place, fields in ((2, ["data.email", "data.subject"]), (6, ["send_at"])):
        error = results[place].error
        assert (error.index, error.code, error.reason) == (place, 3, "INVALID_REQUEST")
        assert [violation.field for violation in error.violations] == fields
        assert error.message
    expected = [known.id, first.id, results[7].task.id]
    eventually(lambda: published(installation, "items") == Counter(expected))
    # If all are refused, each still has a result.
    refused = tasks.BatchCreate(BatchCreateRequest(requests=[item(n, body=None) for n in range(3)])).results
    assert [result.error.index for result in refused] == [0, 1, 2]


def test_a_response_never_exceeds_the_clients_limit(tasks: Any) -> None:
    """A client would discard a response above 4 MiB, and never learn what was recorded."""
    labels = {f"{n:060}": "v" * 250 for n in range(64)}
    batch = [request(n, subject="s" * 998, labels=labels) for n in range(300)]
    results = tasks.BatchCreate(BatchCreateRequest(requests=batch), timeout=30).results
    assert all(result.task.id for result in results)
    assert results[0].task.labels == labels
    assert not results[-1].task.labels
    bad = {f"X-{n:060}\t": "v" for n in range(50)}
    refused = [request(n, headers=bad, email="x" * 300) for n in range(600)]
    results = tasks.BatchCreate(BatchCreateRequest(requests=refused), timeout=30).results
    assert results[0].error.violations
    assert not results[-1].error.violations
    assert all(result.error.message for result in results)


def test_the_largest_batch_is_recorded_and_a_larger_one_is_refused(tasks: Any) -> None:
    """gRPC refuses a request beyond the server's limit as a whole."""
    large: dict[str, Any] = {"body": "x" * 500_000, "labels": {"large": ""}}
    # To record ten of the sixty shows the same, and costs less.
    batch = [request(n, **large) for n in range(10)] + [request(email="", **large) for _ in range(50)]
    results = tasks.BatchCreate(BatchCreateRequest(requests=batch), timeout=60).results
    outcomes = Counter(result.WhichOneof("outcome") for result in results)
    assert outcomes == {"task": 10, "error": 50}
    with pytest.raises(grpc.RpcError) as caught:
        tasks.BatchCreate(BatchCreateRequest(requests=[request(n, **large) for n in range(70)]))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert tasks.Count(CountRequest(labels=large["labels"])).total == 10


@pytest.mark.breaks_servers
def test_waiting_batches_keep_no_single_create_out(servers: Infra) -> None:
    """Batches have limits of their own, and the api refuses one at a limit before it decodes it."""
    few = {"POSTROAD_MAX_PENDING_CREATES": "20", "POSTROAD_MAX_IN_FLIGHT_BYTES": "65536"}
    batch = BatchCreateRequest(requests=[request(n, body="x" * 5000) for n in range(20)])
    with (
        ApiProcess(Installation(servers), **few) as api,
        grpc.insecure_channel(api.target) as channel,
        ThreadPoolExecutor(3) as threads,
    ):
        tasks = TaskServiceStub(channel)
        tasks.Create(request(), timeout=20)
        with servers.frozen("mysql"):
            calls = [threads.submit(tasks.BatchCreate, batch, timeout=60) for _ in range(3)]
            eventually(lambda: sum(call.done() for call in calls) == 2)
            assert code(tasks.Create, request()) is grpc.StatusCode.UNAVAILABLE
            no_batch = channel.unary_unary("/postroad.v1.TaskService/BatchCreate")
            assert code(no_batch, b"\xff") is grpc.StatusCode.RESOURCE_EXHAUSTED
        errors = [call.exception() for call in calls]
        assert [error.code() for error in errors if isinstance(error, grpc.RpcError)] == [
            grpc.StatusCode.RESOURCE_EXHAUSTED
        ] * 2
        assert errors.count(None) == 1
        # The limits are free again.
        assert len(tasks.BatchCreate(batch, timeout=20).results) == 20
        assert code(no_batch, b"\xff") is grpc.StatusCode.INVALID_ARGUMENT


def code(call: Any, request_: Any) -> grpc.StatusCode:
    """Return the code of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request_, timeout=30)
    found: grpc.StatusCode = caught.value.code()
    return found
