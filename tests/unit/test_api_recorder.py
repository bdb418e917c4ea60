"""The recorder beside batches, and what may wait for it, without a database."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest

from postroad.v1 import events_pb2
from postroad.v1.task_service_pb2 import CreateRequest, TaskData
from services.api import recorder
from services.api.admission import AdmissionControl
from services.api.errors import StatusError
from services.api.new_task_row import row_of_new_task
from services.api.outbox import NewTask, OutboxEvent
from services.api.recorder import Recorder
from services.api.uuid7 import IdGenerator
from services.api.validation import task_created
from services.common.fold import delta


def new_tasks(count: int) -> list[NewTask]:
    return [OutboxEvent(events_pb2.TaskCreated(at_us=1), b"trace", 10) for _ in range(count)]


async def test_single_creates_wait_for_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches keep coming, and the database takes no end of time for the first one."""
    batch_goes_on = threading.Event()

    def write(connection: object, batch: list[NewTask]) -> tuple[list[None], list[NewTask]]:
        if len(batch) > 1:
            assert batch_goes_on.wait(10)
        return [None] * len(batch), batch

    monkeypatch.setattr(recorder, "transaction", lambda engine, work: work(None))
    monkeypatch.setattr(recorder, "_write", write)
    committed: list[int] = []
    engine: Any = None
    of_test = Recorder(engine, lambda tasks: committed.append(len(tasks)), 10_000, 1 << 20)
    batches = [asyncio.ensure_future(of_test.record_batch(new_tasks(500))) for _ in range(4)]
    await asyncio.sleep(0)
    for _ in range(20):
        assert await asyncio.wait_for(of_test.record(*new_tasks(1)), 30) is None
    assert committed == [1] * 20
    batch_goes_on.set()
    assert [len(results) for results in await asyncio.gather(*batches)] == [500] * 4
    assert committed == [1] * 20 + [500] * 4
    await of_test.close()


@pytest.mark.parametrize(
    "data",
    [
        {"body": "text"},
        {"body": "", "html": "<p>", "labels": {"b": '"', "a": "é"}, "headers": {"X-A": "1"}},
        {"body": "", "subject": "é" * 300, "email": "a" * 64 + "@" + ".".join(["d" * 60] * 3)},
    ],
)
@pytest.mark.parametrize("key", ["", "k" * 255, "é" * 127], ids=["no key", "long key", "key in UTF-8"])
@pytest.mark.parametrize("ahead_us", [0, 3_600_000_000])
def test_the_row_of_a_new_task_is_what_the_fold_makes_of_its_event(
    data: dict[str, Any], key: str, ahead_us: int
) -> None:
    request = CreateRequest(data=TaskData(**{"email": "a@shop.test", "subject": "s"} | data))
    now_us = 1_800_000_000_123_456
    request.send_at.FromMicroseconds(now_us + ahead_us)
    event = task_created(request, "t" * 64, key, 1000, now_us)
    event.task.id, event.task.created_at_us = IdGenerator(lambda: now_us * 1000).new()
    event.at_us = event.task.created_at_us
    assert row_of_new_task(event) == delta(event)
    event.task.request_hash = bytes(range(32))
    assert row_of_new_task(event) == delta(event)
    assert (event.send_at_us > 0) == (ahead_us > 0)


def test_calls_are_admitted_below_the_limits_and_leave_them_however_they_end() -> None:
    control = AdmissionControl(max_count=2, max_bytes=100)
    with control.admit(1, 90), control.admit(1, 90):
        for refused in ((1, 0), (0, 1)):
            with pytest.raises(StatusError) as caught, control.admit(*refused):
                pass
            assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(StatusError), control.admit_count(1):
            pass
    with pytest.raises(KeyError), control.admit(2, 200):
        raise KeyError
    assert (control.count, control.bytes) == (0, 0)
    with control.admit(0, 50), control.admit_count(2):
        assert (control.count, control.bytes) == (2, 50)
