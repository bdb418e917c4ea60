"""Runs one schedule by its plan, and checks it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from services.common.kafka.topics import EVENT_TOPICS, MX_OK, TASK_CREATED, Names
from services.common.stages import STAGES, stage_delays
from tests.simulation import checker
from tests.simulation.broker import SESSION, Broker
from tests.simulation.clients import Clients
from tests.simulation.database import Database
from tests.simulation.mail import Dns, MailServer
from tests.simulation.patches import trace_into
from tests.simulation.plan import Fault, Plan
from tests.simulation.process import Process
from tests.simulation.processes import SERVICES, SETTINGS, SIMULATED, Api, Servers, Service, build
from tests.simulation.publisher import Publisher
from tests.simulation.scheduler import Scheduler
from tests.simulation.world import World

__all__ = ["Result", "run"]

_ENOUGH = 1500.0
"""The virtual seconds within which everything settles after the last fault."""


@dataclass(slots=True)
class Result:
    """The result of a schedule. Two different histories have different digests."""

    violations: list[str]
    trace: list[str]
    digest: str
    virtual_seconds: float
    steps: int
    copies: int = 0
    statuses: list[str] = field(default_factory=list)


class _Replica:
    """A process and its service, which a supervisor restarts."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.service: Service | Api | None = None
        self.wanted = True


class Schedule:
    """All the parts of one schedule."""

    def __init__(self, plan: Plan, traced: bool) -> None:
        self.plan = plan
        self.scheduler = Scheduler(plan.seed)
        self.world = World(self.scheduler, traced)
        self.world.strike = self._strike
        settings = SETTINGS[plan.hold].model_copy(update={"max_in_flight": plan.in_flight})
        bare = Names()
        topics = [
            *EVENT_TOPICS,
            *(bare.delay(stage, s) for stage, delays in stage_delays(settings).items() for s in delays),
            *(bare.dead(stage) for stage in STAGES),
        ]
        self.broker = Broker(self.world, topics)
        self.database = Database(self.world)
        numbers = range(len(plan.tasks))
        self.mail = MailServer(self.world, {f"t{n}@d{n}.test": plan.tasks[n].smtp for n in numbers})
        dns = Dns(self.world, {f"d{n}.test": plan.tasks[n].dns for n in numbers})
        self.servers = Servers(self.broker, self.database, self.mail, dns, settings)
        Publisher.broker = self.broker
        self.replicas: list[_Replica] = []
        self.struck: set[str] = set()
        """The names of the processes that were killed or frozen."""
        self.clients = Clients(self)
        self._names = dict.fromkeys(SERVICES, 0)
        self._quiet_after = 0.0
        trace_into(self.world)

    # --- processes ---

    def start(self, service: str) -> _Replica:
        """Start one replica of a service."""
        self._names[service] += 1
        name = f"{service}-{self._names[service]}"
        self.world.trace(name, "starts")
        replica = _Replica(Process(self.scheduler, name, service))
        self.replicas.append(replica)
        self.scheduler.after(0, replica.process, self._boot, replica)
        return replica

    def _boot(self, replica: _Replica) -> None:
        replica.process.loop.create_task(self._life(replica))

    async def _life(self, replica: _Replica) -> None:
        replica.service = build(replica.process, self.servers)
        try:
            await replica.service.run()
            self.world.trace(replica.process.name, "has drained")
        except Exception as error:
            if replica.process.dead:
                return
            self.world.trace(replica.process.name, f"ended: {error!r}")
            self.world.violation(f"{replica.process.service} ended by itself: {error!r}")
        # Nothing of a process runs after its end.
        self.scheduler.after(0, None, self._gone, replica, 0.1 if replica.wanted else None)

    def _gone(self, replica: _Replica, again: float | None) -> None:
        replica.process.kill()
        for consumer in getattr(replica.service, "consumers", ()):
            self.scheduler.after(SESSION, None, consumer.fence)
        if replica in self.replicas:
            self.replicas.remove(replica)
            if again is not None:
                self.scheduler.after(again, None, self.start, replica.process.service)
                self.busy_until(self.scheduler.now + again)

    def live(self, service: str) -> list[_Replica]:
        """Return the live replicas of a service."""
        return [r for r in self.replicas if r.process.service == service and not r.process.dead]

    def busy_until(self, at: float) -> None:
        """Do not end the schedule before this time."""
        self._quiet_after = max(self._quiet_after, at)

    # --- faults ---

    def _strike(self, fault: Fault, process: Process | None) -> None:
        if fault.what in self.world.away:
            self._away(fault.what, fault.seconds)
            return
        if process is None:
            live = self.live(fault.service)
            if fault.what == "join":
                self._join(fault)
                return
            if not live:
                return
            replica = live[fault.replica % len(live)]
        else:
            found = [r for r in self.replicas if r.process is process]
            if not found:
                return
            replica = found[0]
        process = replica.process
        self.world.trace("fault", f"{fault.what} {process.name} {fault.seconds or ''}")
        self.busy_until(self.scheduler.now + fault.seconds)
        if fault.what in ("kill", "freeze"):
            self.struck.add(process.name)
        match fault.what:
            case "kill":
                self._gone(replica, fault.seconds)
            case "stop":
                if replica.service is not None and process.frozen_until <= self.scheduler.now:
                    replica.wanted = True
                    self.scheduler.after(0, process, self._stop, replica)
            case "freeze":
                process.frozen_until = max(process.frozen_until, self.scheduler.now + fault.seconds)
                if fault.seconds > SESSION:
                    for consumer in getattr(replica.service, "consumers", ()):
                        self.scheduler.after(SESSION, None, self._silent, process, consumer)
            case "evict":
                for consumer in getattr(replica.service, "consumers", ()):
                    consumer.fence()
            case "redeliver":
                for consumer in getattr(replica.service, "consumers", ()):
                    self.scheduler.after(0, process, consumer.redeliver)

    def _stop(self, replica: _Replica) -> None:
        if replica.service is not None:
            replica.service.stop()

    def _silent(self, process: Process, consumer: Any) -> None:
        if process.frozen_until > self.scheduler.now and not process.dead:
            consumer.fence()

    def _join(self, fault: Fault) -> None:
        replica = self.start(fault.service)
        replica.wanted = False
        self.busy_until(self.scheduler.now + fault.seconds)
        self.scheduler.after(fault.seconds, replica.process, self._stop, replica)

    def _away(self, server: str, seconds: float) -> None:
        self.world.trace("fault", f"{server} is away for {seconds} s")
        self.world.away[server] = max(self.world.away[server], self.scheduler.now + seconds)
        self.busy_until(self.scheduler.now + seconds)
        if server == "kafka":
            self.scheduler.after(seconds + 0.01, None, self._kafka_back)

    def _kafka_back(self) -> None:
        for replica in self.replicas:
            for consumer in getattr(replica.service, "consumers", ()):
                consumer.wake()

    # --- the run ---

    def begin(self) -> None:
        """Start the services, and schedule all Creates, acts and faults."""
        for service, number in zip(SERVICES, self.plan.replicas, strict=True):
            for _ in range(number):
                self.start(service)
        for number, task in enumerate(self.plan.tasks):
            for _ in range(1 + task.twice):
                self.clients.waiting += 1
                self.scheduler.after(task.at + 0.03, None, self.clients.create, number, task, 20)
        for act in self.plan.acts:
            self.busy_until(act.at)
            self.scheduler.after(act.at, None, self.clients.act, act)
        for fault in self.plan.faults:
            if fault.on:
                self.world.await_operation(fault)
                continue
            self.busy_until(fault.at + fault.seconds)
            if fault.what in self.world.away:
                self.scheduler.after(fault.at, None, self._away, fault.what, fault.seconds)
            else:
                self.scheduler.after(fault.at, None, self._strike, fault, None)

    def quiet(self) -> bool:
        """Return whether nothing is left to do."""
        return (
            not self.clients.waiting
            and not self.database.outbox
            and self.scheduler.now >= self._quiet_after
            and len(self.broker.groups) == len(SIMULATED)
            and all(group.topics and not group.lag() for group in self.broker.groups.values())
            # A task that never settles keeps the schedule running until its time is over.
            and all(row.status in checker.TERMINAL for row in self.database.tasks.values())
        )

    def settle(self) -> bool:
        """Run until nothing is left to do. Return False when that takes too long."""
        scheduler = self.scheduler
        while True:
            at = scheduler.next_at()
            if at is None or at > max(self._quiet_after, 0) + _ENOUGH:
                return self.quiet()
            scheduler.run(max(scheduler.now + 0.5, at))
            if self.quiet():
                return True


def run(plan: Plan, traced: bool = False) -> Result:
    """Run one schedule and return its result. The in-memory ports must be installed (patches.py)."""
    schedule = Schedule(plan, traced)
    try:
        schedule.begin()
        settled = schedule.settle()
        checker.check(schedule, settled)
        if settled and plan.replay_all and not schedule.world.violations:
            before = checker.copies_of_settled(schedule)
            schedule.world.trace("operator", "replays everything")
            for topic in (TASK_CREATED, MX_OK):
                schedule.clients.replay(topic)
            schedule.busy_until(schedule.scheduler.now + 1)
            settled = schedule.settle()
            checker.check(schedule, settled)
            checker.check_replay(schedule, before)
    finally:
        schedule.scheduler.dispose()
    world = schedule.world
    rows = schedule.database.tasks
    statuses = [rows[id_].status for id_ in sorted(rows)]
    story = repr((schedule.scheduler.steps, schedule.scheduler.now, statuses, len(schedule.mail.journal)))
    return Result(
        world.violations,
        world.lines or [],
        hashlib.sha256(story.encode()).hexdigest()[:12],
        schedule.scheduler.now,
        schedule.scheduler.steps,
        len(schedule.mail.journal),
        statuses,
    )
