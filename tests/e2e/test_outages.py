"""MySQL, Kafka or the relay is away for a while, under load: nothing is lost, and nobody has to help."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from tests.cli import Command
from tests.e2e.pipeline import Pipeline, until
from tests.e2e.replicas import metric, problems
from tests.forms import LONG, by_form
from tests.stack import Stack

AWAY = by_form(0.0, 20.0)


@pytest.fixture
def pipeline(stack: Stack) -> Iterator[Pipeline]:
    with Pipeline(stack) as pipeline:
        yield pipeline


class Load:
    """Keeps creating tasks, each once, and records the answers. A context manager."""

    def __init__(self, pipeline: Pipeline, mark: str) -> None:
        self._pipeline, self._mark = pipeline, mark
        self._stop = threading.Event()
        self.accepted: list[str] = []
        self.refused: list[grpc.StatusCode] = []

    def _run(self, lane: int) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                email = f"{self._mark}{lane}-{number}@d{number % 50}.ok.test"
                self.accepted.append(self._pipeline.create(email))
            except grpc.RpcError as error:
                self.refused.append(error.code())  # type: ignore[attr-defined]
            number += 1
            self._stop.wait(0.2)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._run, args=(lane,)) for lane in range(2)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def _killed(stack: Stack, name: str) -> Iterator[None]:
    stack.kill(name)
    try:
        yield
    finally:
        stack.start(name)


@pytest.mark.timeout(600)
def test_mysql_away(pipeline: Pipeline, stack: Stack) -> None:
    with Load(pipeline, "m") as load:
        until(lambda: len(load.accepted) > 10, "a first few Creates")
        with _killed(stack, "mysql"):
            until(lambda: len(load.refused) > 10, "Creates are refused")
            time.sleep(AWAY)
        before = len(load.accepted)
        until(lambda: len(load.accepted) > before + 10, "Creates are taken again")
    assert set(load.refused) == {grpc.StatusCode.UNAVAILABLE}
    tasks = pipeline.settled(load.accepted, 90)
    assert {task.status for task in tasks.values()} == {"completed"}
    pipeline.sent_once(load.accepted)


@pytest.mark.timeout(600)
def test_kafka_away(pipeline: Pipeline, stack: Stack) -> None:
    # A broker takes long to start: the short form freezes it.
    away = _killed if LONG else Stack.frozen
    with Load(pipeline, "k") as load:
        until(lambda: len(load.accepted) > 10, "a first few Creates")
        with away(stack, "kafka-1"):
            before = len(load.accepted)
            until(lambda: len(load.accepted) > before + 20, "Creates go on")
            time.sleep(AWAY)
    assert not load.refused, "Create needs no Kafka"
    tasks = pipeline.settled(load.accepted, 120)
    assert {task.status for task in tasks.values()} == {"completed"}
    pipeline.sent_once(load.accepted)


@pytest.mark.skipif(not LONG, reason="a broker takes long to start: make test-long")
@pytest.mark.timeout(300)
def test_a_watched_lag_is_shown_again_after_kafka_was_away(stack: Stack) -> None:
    with Command(stack.env()).following("lag", "--watch", "--interval", "2", "-o", "jsonl") as watch:
        until(lambda: watch.objects, "a first sample of the lag")
        with _killed(stack, "kafka-1"):
            until(lambda: any("does not answer" in line for line in watch.errors), "the trouble is shown")
        samples = len(watch.objects)
        until(
            lambda: (
                len(watch.objects) > samples
                and not any(row["unowned"] for row in watch.objects[-1]["stages"])
            ),
            "the lag is shown again, with an owner of each partition",
        )


@pytest.mark.timeout(300)
def test_tasks_wait_without_attempts_while_the_relay_is_away(stack: Stack) -> None:
    with Pipeline(stack) as pipeline:
        stack.kill("catcher")
        try:
            ids = pipeline.create_many([f"r{n}@d{n}.ok.test" for n in range(12)], f"relay-{time.time_ns()}")
            until(
                lambda: any("relay" in problem for problem in problems(stack, "sender-1")),
                "the trouble shows",
            )
            until(
                lambda: {pipeline.get(id_).status for id_ in ids} == {"processing"},
                "all wait for the relay",
            )
            until(lambda: metric(stack, "sender-1", "postroad_sender_claims ") == 0, "nothing is in doubt")
        finally:
            stack.start("catcher")
        tasks = pipeline.settled(ids, 60)
        assert {(task.status, task.attempts) for task in tasks.values()} == {("completed", 1)}
        pipeline.sent_once(ids)
        until(lambda: not problems(stack, "sender-1"), "no problem is left")
