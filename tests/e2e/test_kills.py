"""Services die under load: every task still ends, and no mail goes out twice unrecorded."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from deploy.local.state import SERVICES
from tests.e2e.pipeline import Pipeline, until
from tests.forms import by_form
from tests.groups import describe
from tests.stack import Stack

TASKS = by_form(120, 2000)


@pytest.mark.timeout(600)
def test_each_service_killed_in_turn(stack: Stack) -> None:
    with Pipeline(stack) as pipeline, Load(pipeline, "kill") as load:
        for service in SERVICES:
            at = len(stack.journal())
            # During its work, not before or after.
            until(lambda at=at: len(stack.journal()) > at + 8, "mail under way")  # type: ignore[misc]
            stack.kill(f"{service}-1")
            stack.start(f"{service}-1")
        until(lambda: len(load.ids) >= TASKS, "as many tasks as asked for", 240)
        load.end()
        tasks = pipeline.settled(load.ids, 120)
        assert {task.status for task in tasks.values()} == {"completed"}
        pipeline.sent_once(load.ids)
        until(lambda: not any(pipeline.lag().values()), "all committed", 30)


@pytest.mark.timeout(600)
def test_senders_come_and_go(new_stack: Callable[..., Stack]) -> None:
    stack = new_stack(POSTROAD_PARTITIONS="12")
    stack.up("--sender", "2")
    with Pipeline(stack) as pipeline:
        until(lambda: len(_spread(pipeline)) == 2, "two owners", 30)
        assert sum(_spread(pipeline).values()) == 12, "each partition of mx.ok has one owner"

        with Load(pipeline, "scale") as load:
            stack.scale("sender", 3)
            until(lambda: len(_spread(pipeline)) == 3, "the third has its share", 3)
            until(lambda: sum(_spread(pipeline).values()) == 12, "each partition has one owner", 10)
            stack.kill("sender-2")
            until(
                lambda: len(_spread(pipeline)) == 2 and sum(_spread(pipeline).values()) == 12,
                "the killed one's share is taken over within the session timeout",
                # 10 s from its last heartbeat, and the time that the new owners need to join.
                14,
            )
        tasks = pipeline.settled(load.ids, 60)
        assert {task.status for task in tasks.values()} == {"completed"}
        pipeline.sent_once(load.ids)


class Load:
    """Careful callers that create `rate` tasks a second until `end`, which raises their errors.

    A context manager.
    """

    def __init__(self, pipeline: Pipeline, mark: str, callers: int = 4, rate: float = 20.0) -> None:
        self._pipeline, self._mark, self._pause = pipeline, mark, callers / rate
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self.ids: list[str] = []
        self._lanes = [self._pool.submit(self._run, lane) for lane in range(callers)]

    def _run(self, lane: int) -> None:
        for number in itertools.count():
            if self._stop.is_set():
                return
            email = f"u{lane}-{number}@d{number % 50}.ok.test"
            self.ids.append(self._pipeline.create_surely(email, f"{self._mark}-{lane}-{number}"))
            self._stop.wait(self._pause)

    def end(self) -> None:
        """Let each caller finish its task."""
        self._stop.set()
        for lane in self._lanes:
            lane.result()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        if kind is None:
            self.end()


def _spread(pipeline: Pipeline) -> dict[str, int]:
    """Return how many partitions of mx.ok each member of the senders' group owns."""
    names = pipeline.stack.names
    group = describe(pipeline.stack.env()["POSTROAD_KAFKA_BOOTSTRAP"], names.group("sender"))
    owned: list[int] = []
    spread = {}
    for member in group.members:
        mine = member.owned.get(names.topic("mx.ok"), ())
        owned += mine
        if mine:
            spread[member.id] = len(mine)
    assert len(owned) == len(set(owned)), "a partition has two owners"
    return spread
