"""Cancel races with the sender, and Retry follows: each answer agrees with the mail server's journal."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from postroad.v1 import task_pb2
from postroad.v1 import task_service_pb2 as pb
from tests.e2e.pipeline import SETTLED, Pipeline, until
from tests.forms import by_form
from tests.stack import Stack

RACES = by_form(64, 2000)
CALLERS = by_form(16, 32)
# The longest of the moments (seconds).
LATEST = by_form(2.5, 8.0)
# What the mail server does to them, which decides how long the sender holds their claims.
KINDS = ("a", "a", "slow-20", "slow-80", "slow-300", "greylist-3", "reject5", "drop-before")


def cancel(pipeline: Pipeline, id_: str) -> task_pb2.Task:
    """Cancel a task, as a careful client does: again while its mail is under way."""
    return _carefully(lambda: pipeline.stub.Cancel(pb.CancelRequest(id=id_), timeout=20))


def retry(pipeline: Pipeline, id_: str) -> task_pb2.Task:
    """Retry a task."""
    return _carefully(lambda: pipeline.stub.Retry(pb.RetryRequest(id=id_), timeout=20))


def _carefully(call: Callable[[], task_pb2.Task]) -> task_pb2.Task:
    """Repeat a call while the database is slow, or the task's mail is under way."""
    end = time.monotonic() + 90
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            passing = error.code() is grpc.StatusCode.UNAVAILABLE or reason(error) == "BEING_SENT"  # type: ignore[attr-defined]
            if not passing or time.monotonic() > end:
                raise
            time.sleep(0.05)


def reason(error: grpc.RpcError) -> str:
    """Return the ErrorInfo's reason."""
    [raw] = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]  # type: ignore[attr-defined]
    [packed] = [
        d for d in status_pb2.Status.FromString(raw).details if d.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)
    ]
    return str(error_details_pb2.ErrorInfo.FromString(packed.value).reason)


def quiet(pipeline: Pipeline) -> None:
    """Wait until the stages have handled all records."""
    until(lambda: not any(pipeline.lag().values()), "all committed", 60)


@pytest.mark.timeout(600)
def test_each_race_ends_as_cancel_answered(stack: Stack) -> None:
    seed = time.time_ns()

    def race(number: int) -> tuple[str, task_pb2.Task]:
        rng = random.Random(seed + number)
        email = f"{KINDS[number % len(KINDS)]}+{number}@c{number % 40}.ok.test"
        id_ = pipeline.create_surely(email, f"race-{seed}-{number}")
        # The moments reach from before its first event is published to long after its mail is sent. On a slow
        # machine all random moments may come too early, so the first tasks wait for their sender.
        if number < len(KINDS):
            until(lambda: pipeline.get(id_).status in SETTLED or pipeline.get(id_).attempts, "an attempt")
        else:
            time.sleep(rng.choice((0.0, 0.02, 0.1, 0.5, LATEST)) * rng.random())
        return id_, cancel(pipeline, id_)

    with Pipeline(stack) as pipeline, ThreadPoolExecutor(CALLERS) as callers:
        answered = dict(callers.map(race, range(RACES)))
        quiet(pipeline)
        copies = pipeline.copies(answered)
        counted: Counter[str] = Counter()
        for id_, answer in answered.items():
            counted[answer.status] += 1
            now = pipeline.get(id_)
            assert now.status == answer.status, f"{id_}: seed {seed}"
            assert copies[id_] == (answer.status == "completed"), f"{id_} is {answer.status}: seed {seed}"
            kinds = [entry.kind for entry in now.timeline]
            assert kinds.count("cancelled") == (answer.status == "cancelled")
        assert set(counted) == {"cancelled", "completed", "failed"}, counted
        # A delayed attempt of a cancelled task may still come: it sends nothing.
        deferred = [
            id_ for id_, answer in answered.items() if answer.status == "cancelled" and answer.attempts
        ]
        assert deferred, "none was cancelled between two attempts"
        print(f"{RACES} races: {dict(counted)}, {len(deferred)} between two attempts")


@pytest.mark.timeout(300)
def test_a_cancelled_task_is_sent_only_after_a_retry(
    stack: Stack,
) -> None:
    with Pipeline(stack) as pipeline:
        waiting = pipeline.create("reject4@good.test")
        until(lambda: pipeline.get(waiting).attempts, "an attempt")
        data = pb.TaskData(email="ada@good.test", subject="Later", body="text")
        asked = pb.CreateRequest(data=data)
        asked.send_at.FromNanoseconds(time.time_ns() + 5 * 10**9)
        scheduled = pipeline.stub.Create(asked, timeout=20).id
        for id_ in (waiting, scheduled):
            assert cancel(pipeline, id_).status == "cancelled"
        # The events reach the topics all the same, and the stages have handled them.
        until(lambda: scheduled in _keys(pipeline, "task.cancelled"), "its end is on the topic")
        until(lambda: scheduled in _keys(pipeline, "task.created"), "it is on the topic")
        quiet(pipeline)
        assert pipeline.copies([waiting, scheduled]) == {waiting: 0, scheduled: 0}
        assert cancel(pipeline, scheduled).status == "cancelled"

        assert retry(pipeline, scheduled).status == "pending"
        assert pipeline.settled([scheduled])[scheduled].status == "completed"
        assert [entry.kind for entry in pipeline.get(scheduled).timeline] == [
            "created",
            "cancelled",
            "retried",
            "mx_ok",
            "sent",
        ]
        pipeline.sent_once([scheduled])


def _keys(pipeline: Pipeline, topic: str) -> set[str]:
    from services.api.uuid7 import text

    return {text(record.key()) for record in pipeline.records(topic)}
