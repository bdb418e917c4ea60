"""The clients and the operators of a schedule: Creates, Cancels, Retries, replays and poison."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import grpc

from postroad.v1 import events_pb2 as pb
from services.api.errors import StatusError
from services.api.outbox import OutboxEvent
from services.api.uuid7 import parse
from services.common.events import DECODERS, encode, task_id
from tests.simulation.plan import Act, TaskPlan
from tests.simulation.processes import Api
from tests.simulation.scheduler import EPOCH

if TYPE_CHECKING:
    from tests.simulation.run import Schedule

__all__ = ["Answer", "Clients"]

DECISIONS = ("cancel", "retry")


class Answer(NamedTuple):
    """The answer to a Cancel, and when the client called it."""

    task: bytes
    asked: float
    status: str


class Clients:
    """Calls the api and writes to the topics of a schedule, and records the answers."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._scheduler, self._world = schedule.scheduler, schedule.world
        self.waiting = 0
        """How many calls have no final answer yet."""
        self.accepted: set[bytes] = set()
        self.answers: list[Answer] = []
        self.reopened: dict[bytes, float] = {}
        """When each task was last reopened, or when that was last asked for."""
        self.poison: list[str] = []
        self._draws = 0

    def create(self, number: int, plan: TaskPlan, tries: int) -> None:
        """Try once to create a task at a live api; try again `tries` times."""
        again: Callable[[], None] | None = None
        if plan.key and tries:
            again = lambda: self.create(number, plan, tries - 1)  # noqa: E731
        live = [r for r in self._schedule.live("api") if isinstance(r.service, Api)]
        if not live:
            self._later(again, 0.5)
            return
        api, process = live[0].service, live[0].process
        assert isinstance(api, Api)
        self._draws += 1
        rng = self._scheduler.rng
        id_ = bytes([1, 144, *([7] * 10), self._draws >> 8, self._draws & 255, number, rng.randrange(256)])
        now_us = EPOCH * 1_000_000 + int(self._scheduler.now * 1e6)
        task = pb.MailTask(
            id=id_,
            tenant="t",
            idempotency_key=f"key-{number}" if plan.key else "",
            request_hash=hashlib.sha256(b"%d" % number).digest(),
            email=f"t{number}@d{number}.test",
            domain=f"d{number}.test",
            subject="s",
            body="text",
            created_at_us=now_us,
        )
        send_at_us = now_us + int(plan.send_in * 1e6) if plan.send_in else 0
        recording = OutboxEvent(pb.TaskCreated(task=task, at_us=now_us, send_at_us=send_at_us), b"", 100)
        answered = False

        def hear(accepted: bytes | None) -> None:
            nonlocal answered
            if answered:
                return
            answered = True
            if accepted is None:
                self._later(again, 0.5)
            else:
                self._world.trace("client", f"task {number} is accepted")
                self.accepted.add(accepted)
                self.waiting -= 1

        async def ask() -> None:
            accepted = None
            try:
                original = await api.recorder.record(recording)
                accepted = id_ if original is None else parse(original.id)
            except (StatusError, RuntimeError):
                pass
            self._scheduler.after(self._scheduler.latency(), None, hear, accepted)

        self._scheduler.after(self._scheduler.latency(), process, lambda: process.loop.create_task(ask()))
        self._scheduler.after(6.0, None, hear, None)

    def _later(self, again: Callable[[], None] | None, seconds: float) -> None:
        if again is None:
            self.waiting -= 1
        else:
            self._scheduler.after(seconds, None, again)

    def act(self, act: Act) -> None:
        self._world.trace("operator", f"{act.what} {act.task if act.what in DECISIONS else act.topic}")
        match act.what:
            case "cancel" | "retry":
                for id_ in [id_ for id_ in self._schedule.database.tasks if id_[-2] == act.task]:
                    self.waiting += 1
                    self._decide(act.what, id_, 20)
            case "replay":
                self.replay(act.topic)
            case "poison":
                self.poison.append(act.topic)
                self._schedule.broker.append(act.topic, b"%16d" % len(self.poison), b"\xff\xff", [])

    def _decide(self, what: str, id_: bytes, tries: int) -> None:
        """Try once to cancel or retry a task; try again `tries` times."""
        again: Callable[[], None] | None = None
        if tries:
            again = lambda: self._decide(what, id_, tries - 1)  # noqa: E731
        live = [r for r in self._schedule.live("api") if isinstance(r.service, Api)]
        if not live:
            self._later(again, 0.5)
            return
        api, process = live[-1].service, live[-1].process
        assert isinstance(api, Api)
        asked = self._scheduler.now
        if what == "retry":
            self.reopened[id_] = asked
        decide = api.decider.cancel if what == "cancel" else api.decider.retry
        answered = False

        def hear(status: str) -> None:
            nonlocal answered
            if answered:
                return
            answered = True
            if status == "unknown":
                self._later(again, 0.5)
                return
            self.waiting -= 1
            self._world.trace("client", f"{what} of task {id_[-2]}: {status}")
            if what == "cancel":
                self.answers.append(Answer(id_, asked, status))

        async def ask() -> None:
            try:
                status = (await decide("t", id_, b"")).status
            except StatusError as problem:
                refused = problem.code is grpc.StatusCode.FAILED_PRECONDITION
                status = "refused" if refused else "unknown"
            self._scheduler.after(self._scheduler.latency(), None, hear, status)

        self._scheduler.after(self._scheduler.latency(), process, lambda: process.loop.create_task(ask()))
        self._scheduler.after(10.0, None, hear, "unknown")

    def replay(self, topic: str) -> None:
        """Produce all records of a topic again with every task reopened: more than a replay may do."""
        epoch = EPOCH * 1000 + int(self._scheduler.now * 1000)
        for message in self._schedule.broker.records(topic):
            if message.value() == b"\xff\xff":
                continue
            event = DECODERS[topic](message.value())
            assert isinstance(event, pb.TaskCreated | pb.MxOk)
            event.epoch = epoch
            event.at_us = epoch * 1000
            self.reopened[task_id(event)] = self._scheduler.now
            out = encode(event, "replay")
            self._schedule.broker.append(topic, out.key, out.value, out.headers)
