"""Runs many schedules on every core, and shrinks the plan of one that fails."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from tests.simulation import mutants
from tests.simulation.patches import installed
from tests.simulation.plan import Fault, Plan, TaskPlan, make
from tests.simulation.run import Result, run

__all__ = ["Failure", "Report", "explore", "prepared", "shrink", "try_plan"]

_CHUNK = 50


@dataclass(frozen=True, slots=True)
class Failure:
    """A plan with violations."""

    plan: Plan
    violations: tuple[str, ...]


@dataclass(slots=True)
class Report:
    """The results of many schedules."""

    schedules: int = 0
    seconds: float = 0.0
    steps: int = 0
    mails: int = 0
    faults: int = 0
    virtual_hours: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Add the results of another process."""
        self.schedules += other.schedules
        self.steps += other.steps
        self.mails += other.mails
        self.faults += other.faults
        self.virtual_hours += other.virtual_hours
        self.failures += other.failures
        for status, count in other.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + count


@contextlib.contextmanager
def prepared(mutant: str | None = None) -> Iterator[None]:
    """Install the in-memory ports within the block, and a mutant when one is named."""
    with installed(), mutants.applied(mutant):
        yield


def try_plan(plan: Plan, traced: bool = False) -> Result:
    """Run one plan. An exception counts as a violation."""
    try:
        return run(plan, traced)
    except Exception as error:
        return Result([f"the schedule raised {error!r}"], [], "", 0.0, 0)


def _several(arguments: tuple[int, int, str | None]) -> Report:
    first, count, mutant = arguments
    report = Report()
    with prepared(mutant):
        for seed in range(first, first + count):
            plan = make(seed)
            result = try_plan(plan)
            report.schedules += 1
            report.steps += result.steps
            report.mails += result.copies
            report.faults += len(plan.faults)
            report.virtual_hours += result.virtual_seconds / 3600
            for status in result.statuses:
                report.statuses[status] = report.statuses.get(status, 0) + 1
            if result.violations:
                report.failures.append(Failure(plan, tuple(result.violations)))
    gc.collect()
    return report


def _settle_in() -> None:
    gc.collect()
    gc.freeze()
    # The garbage is collected between the chunks: a collection at every 700 objects costs too much.
    gc.set_threshold(200_000, 50, 50)


def explore(
    first: int,
    *,
    schedules: int | None = None,
    seconds: float | None = None,
    mutant: str | None = None,
    stop_at: int = 1,
    workers: int | None = None,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run the schedules of the seeds from `first` on, until one limit is reached or `stop_at` have failed."""
    started = time.monotonic()
    report = Report()
    workers = workers or len(os.sched_getaffinity(0))

    def chunks() -> Iterator[tuple[int, int, str | None]]:
        seed = first
        while schedules is None or seed < first + schedules:
            if seconds is not None and time.monotonic() - started >= seconds:
                return
            count = _CHUNK if schedules is None else min(_CHUNK, first + schedules - seed)
            yield seed, count, mutant
            seed += count

    with multiprocessing.get_context("spawn").Pool(workers, _settle_in) as pool:
        waiting: list[multiprocessing.pool.AsyncResult[Report]] = []
        more = chunks()
        while True:
            while len(waiting) < 2 * workers and (chunk := next(more, None)) is not None:
                waiting.append(pool.apply_async(_several, (chunk,)))
            if not waiting:
                break
            report.add(waiting.pop(0).get())
            report.seconds = time.monotonic() - started
            progress(report)
            if len(report.failures) >= stop_at:
                break
    return report


def shrink(plan: Plan, budget: float = 20.0) -> Plan:
    """Return a smaller plan that still fails, the smallest that can be found within `budget` seconds.

    The ports must be installed. The smaller plan may have other violations.
    """
    until = time.monotonic() + budget
    shrinking = True
    while shrinking and time.monotonic() < until:
        shrinking = False
        for smaller in _smaller(plan):
            if time.monotonic() >= until:
                break
            if try_plan(smaller).violations:
                plan, shrinking = smaller, True
                break
    return plan


def _smaller(plan: Plan) -> Iterator[Plan]:
    for index in range(len(plan.faults)):
        yield replace(plan, faults=plan.faults[:index] + plan.faults[index + 1 :])
    for index in range(len(plan.acts)):
        yield replace(plan, acts=plan.acts[:index] + plan.acts[index + 1 :])
    if plan.replay_all:
        yield replace(plan, replay_all=False)
    for index in reversed(range(len(plan.tasks) if len(plan.tasks) > 1 else 0)):
        # Acts name tasks by their numbers, so only the last task can be removed.
        if index == len(plan.tasks) - 1 and all(
            act.what not in ("cancel", "retry") or act.task < index for act in plan.acts
        ):
            yield replace(plan, tasks=plan.tasks[:index])
    for index, count in enumerate(plan.replicas):
        if count > 1:
            fewer = (*plan.replicas[:index], count - 1, *plan.replicas[index + 1 :])
            yield replace(plan, replicas=fewer)
    for index, task in enumerate(plan.tasks):
        for simpler in _simpler(task):
            yield replace(plan, tasks=(*plan.tasks[:index], simpler, *plan.tasks[index + 1 :]))
    for index, fault in enumerate(plan.faults):
        for milder in _milder(fault):
            yield replace(plan, faults=(*plan.faults[:index], milder, *plan.faults[index + 1 :]))
    if plan.in_flight != 50:
        yield replace(plan, in_flight=50)


def _simpler(task: TaskPlan) -> Iterator[TaskPlan]:
    plain = TaskPlan(0.0)
    for name in ("at", "dns", "smtp", "key", "twice", "send_in"):
        if getattr(task, name) != getattr(plain, name):
            yield replace(task, **{name: getattr(plain, name)})
    if len(task.smtp) > 1:
        yield replace(task, smtp=task.smtp[1:])
    if len(task.dns) > 1:
        yield replace(task, dns=task.dns[1:])


def _milder(fault: Fault) -> Iterator[Fault]:
    for seconds in (0.0, 1.0, 12.0, 25.0):
        if seconds < fault.seconds:
            yield replace(fault, seconds=seconds)


if __name__ == "__main__":
    sys.exit("python -m tests.simulation")
