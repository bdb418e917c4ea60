"""MySQL, Kafka or the relay is away for a while, under load: nothing is lost, and nobody has to help."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from tests.cli import Command
from tests.e2e.pipeline import Pipeline, until
from tests.e2e.test_sender import metric, problems
from tests.forms import by_form
from tests.stack import Stack

# A server also needs time to start.
AWAY = by_form(3.0, 20.0)


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
        self.slowest = 0.0

    def _run(self, lane: int) -> None:
        number = 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                email = f"{self._mark}{lane}-{number}@d{number % 50}.ok.test"
                self.accepted.append(self._pipeline.create(email))
            except grpc.RpcError as error:
                self.refused.append(error.code())  # type: ignore[attr-defined]
            self.slowest = max(self.slowest, time.monotonic() - began)
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


def _away(stack: Stack, name: str, load: Load) -> None:
    """Stop a server for AWAY seconds while the load continues."""
    until(lambda: len(load.accepted) > 20, "a first few Creates")
    stack.kill(name)
    time.sleep(AWAY)
    stack.start(name)


@pytest.mark.timeout(600)
def test_mysql_away(pipeline: Pipeline, stack: Stack) -> None:
    with Load(pipeline, "m") as load:
        _away(stack, "mysql", load)
        before = len(load.accepted)
        until(lambda: len(load.accepted) > before + 20, "Creates are taken again", 15)
    assert load.refused, "nothing was refused while there was no database"
    assert set(load.refused) == {grpc.StatusCode.UNAVAILABLE}
    assert load.slowest < 15, "a Create hung"
    tasks = pipeline.settled(load.accepted, 90)
    assert {task.status for task in tasks.values()} == {"completed"}
    pipeline.sent_once(load.accepted)


@pytest.mark.timeout(600)
def test_kafka_away(pipeline: Pipeline, stack: Stack) -> None:
    postroad = Command(stack.env())
    with (
        postroad.following("lag", "--watch", "--interval", "2", "-o", "jsonl") as watch,
        Load(pipeline, "k") as load,
    ):
        until(lambda: watch.objects, "a first sample of the lag")
        _away(stack, "kafka-1", load)
        before, samples = len(load.accepted), len(watch.objects)
        until(lambda: len(load.accepted) > before + 20, "Creates go on", 15)
        try:
            until(
                lambda: (
                    len(watch.objects) > samples
                    and not any(row["unowned"] for row in watch.objects[-1]["stages"])
                ),
                "the lag is shown again, with an owner of each partition",
            )
        except AssertionError as error:
            shown = watch.objects[samples:]
            error.add_note(f"{len(shown)} samples came, the last one: {shown[-1:]}; stderr: {watch.errors}")
            raise
        assert any("does not answer" in line for line in watch.errors), watch.errors
    assert not load.refused, "Create needs no Kafka"
    assert load.slowest < 5, "a Create hung"
    tasks = pipeline.settled(load.accepted, 120)
    assert {task.status for task in tasks.values()} == {"completed"}
    pipeline.sent_once(load.accepted)


@pytest.mark.timeout(300)
def test_tasks_wait_without_attempts_while_the_relay_is_away(stack: Stack) -> None:
    with Pipeline(stack) as pipeline:
        stack.kill("catcher")
        try:
            ids = pipeline.create_many([f"r{n}@d{n}.ok.test" for n in range(40)], f"relay-{time.time_ns()}")
            until(
                lambda: any("relay" in problem for problem in problems(stack, "sender-1")),
                "the trouble shows",
            )
            until(
                lambda: {pipeline.get(id_).status for id_ in ids} == {"processing"},
                "all wait for the relay",
                30,
            )
            until(
                lambda: metric(stack, "sender-1", "postroad_sender_claims ") == 0, "nothing is in doubt", 30
            )
        finally:
            stack.start("catcher")
        tasks = pipeline.settled(ids, 60)
        assert {(task.status, task.attempts) for task in tasks.values()} == {("completed", 1)}
        pipeline.sent_once(ids)
        assert problems(stack, "sender-1") == []
