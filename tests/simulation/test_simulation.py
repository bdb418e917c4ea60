"""A short simulation: the code keeps its promises, mutants break them, and schedules repeat themselves."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.forms import by_form
from tests.simulation import mutants
from tests.simulation.explore import explore, prepared, shrink, try_plan
from tests.simulation.plan import Act, Fault, Plan, TaskPlan, dump, load, make


@pytest.mark.timeout(1200)
def test_no_schedule_has_a_violation() -> None:
    count = by_form(200, 10_000)
    report = explore(0, schedules=count)
    assert report.schedules == count
    assert [f"seed {f.plan.seed}: {f.violations}" for f in report.failures] == []
    # The schedules are busy: they send mails and have faults.
    assert report.mails > count * 3 // 4
    assert report.faults > count
    assert set(report.statuses) == {"completed", "failed", "uncertain", "cancelled"}


# The most schedules for each mutant; they take seconds on one core.
_ENOUGH = 1_500
# The first seed for mutants that few schedules catch; from seed 0 the search takes ten seconds.
_BEGIN = {"no-fencing-on-settle": 440, "stale-completion-counts": 460, "takes-over-at-once": 470}


@pytest.mark.parametrize("name", sorted(mutants.MUTANTS))
def test_a_mutant_is_caught(name: str) -> None:
    with prepared(name):
        first = _BEGIN.get(name, 0)
        seeds = range(first, first + _ENOUGH)
        caught = next((seed for seed in seeds if try_plan(make(seed)).violations), None)
    assert caught is not None, f"{name} has no violation in {_ENOUGH} schedules"
    with prepared():
        assert try_plan(make(caught)).violations == [], (
            "without the mutant the same schedule has no violation"
        )


def test_a_frozen_senders_late_answer_may_follow_the_cancel_of_a_task_in_doubt() -> None:
    with prepared():
        assert try_plan(make(22_875)).violations == []


def test_a_seed_gives_the_same_trace_in_every_process() -> None:
    script = (
        "from tests.simulation.explore import prepared, try_plan\n"
        "from tests.simulation.plan import make\n"
        "with prepared():\n"
        "    for seed in range(8): print(*try_plan(make(seed), traced=True).trace, sep='\\n')"
    )
    traces = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    [trace] = traces
    assert len(trace.splitlines()) > 200


def test_a_printed_plan_loads_as_the_same_plan() -> None:
    for seed in range(500):
        assert load(dump(make(seed))) == make(seed)


def test_a_failing_plan_is_shrunk_and_still_fails() -> None:
    with prepared("no-claim"):
        failing = next(plan for seed in range(200) if try_plan(plan := make(seed)).violations)
        smallest = shrink(failing, budget=20)
        assert try_plan(smallest).violations
        again = try_plan(load(dump(smallest)), traced=True)
    assert again.violations
    assert again.trace
    size = len(smallest.tasks) + len(smallest.acts) + len(smallest.faults) + sum(smallest.replicas)
    assert size <= 7


# --- schedules that once had violations ----------------------------------------------------------------


@pytest.mark.parametrize("hold", [False, True])
def test_a_frozen_sender_that_wakes_sends_at_most_once_more_with_a_recorded_doubt(hold: bool) -> None:
    plan = Plan(
        seed=1,
        tasks=(TaskPlan(0.0),),
        faults=(Fault("freeze", on="mail", nth=1, seconds=45),),
        hold=hold,
    )
    with prepared():
        result = try_plan(plan)
    assert result.violations == []
    assert result.copies == (1 if hold else 2)


def test_a_task_whose_sender_is_frozen_before_it_sends_is_sent_once() -> None:
    plan = Plan(seed=1, tasks=(TaskPlan(0.0),), faults=(Fault("freeze", on="claim", nth=1, seconds=45),))
    with prepared():
        result = try_plan(plan)
    assert (result.violations, result.copies, result.statuses) == ([], 1, ["completed"])


@pytest.mark.parametrize("before", [("kept_unheard",), ("kept_unheard", "defer"), ("defer", "kept_unheard")])
def test_a_task_in_doubt_that_is_cancelled_is_uncertain(before: tuple[str, ...]) -> None:
    plan = Plan(
        seed=1,
        tasks=(TaskPlan(0.0, smtp=(*before, "ok")),),
        # After as many attempts, before the next one.
        acts=(Act(5.0 if len(before) == 1 else 40.0, "cancel"),),
    )
    with prepared():
        result = try_plan(plan)
        reopened = try_plan(replace(plan, acts=(*plan.acts, Act(100.0, "replay", topic="mx.ok"))))
    assert (result.violations, result.statuses) == ([], ["uncertain"])
    assert (reopened.violations, reopened.statuses) == ([], ["completed"])


def test_a_mail_whose_reply_is_always_lost_is_sent_twice() -> None:
    plan = Plan(seed=1, tasks=(TaskPlan(0.0, smtp=("kept_unheard", "kept_unheard", "ok")),))
    with prepared():
        result = try_plan(plan)
    assert (result.violations, result.copies, result.statuses) == ([], 2, ["uncertain"])


@pytest.mark.parametrize("dns", [("ok", "none"), ("ok", "soft", "none")])
@pytest.mark.parametrize("hold", [False, True])
def test_a_repeated_verdict_changes_nothing_once_the_sender_has_the_task(
    dns: tuple[str, ...], hold: bool
) -> None:
    # The validator dies before its commit, and the DNS answers otherwise when it is back.
    again = Fault("kill", on="produce", nth=2, seconds=1)
    for smtp in (("defer", "defer", "ok"), ("kept_unheard", "ok"), ("slow", "ok"), ("defer", "reject")):
        plan = Plan(seed=1, tasks=(TaskPlan(0.0, dns=dns, smtp=smtp),), faults=(again,), hold=hold)
        with prepared():
            result = try_plan(plan)
        assert result.violations == [], smtp


@pytest.mark.parametrize(
    ("faults", "senders"),
    [
        ((Fault("stop", on="mail", nth=1),), 1),
        ((Fault("stop", on="mail", nth=1),), 2),
        ((Fault("join", at=3.0, service="sender", seconds=30.0),), 1),
        ((Fault("evict", on="mail", nth=1),), 2),
    ],
)
@pytest.mark.parametrize("hold", [False, True])
def test_a_mail_that_was_handed_over_survives_a_drain_and_a_revocation(
    faults: tuple[Fault, ...], senders: int, hold: bool
) -> None:
    """The server answers after 45 s. A revocation waits 10 s, and a drain 20 s, for what is in flight."""
    plan = Plan(
        seed=1,
        tasks=tuple(TaskPlan(0.0, smtp=("hang",)) for _ in range(4)),
        faults=faults,
        replicas=(1, 1, senders, 1),
        hold=hold,
    )
    with prepared():
        result = try_plan(plan)
    assert (result.violations, result.copies, result.statuses) == ([], 4, ["completed"] * 4)


@pytest.mark.parametrize("what", ["evict", "stop", "redeliver"])
def test_a_rebalance_or_a_drain_before_a_doubt_is_recorded_uses_up_no_resend(what: str) -> None:
    """Kafka is away from the second attempt's claim on, so the first one's doubt cannot be published."""
    plan = Plan(
        seed=1,
        tasks=(TaskPlan(0.0, smtp=("kept_unheard", "ok")),),
        faults=(Fault("kafka", on="claim", nth=2, seconds=40.0), Fault(what, at=22.0, service="sender")),
        replicas=(1, 1, 1, 1),
    )
    with prepared():
        result = try_plan(plan)
    assert (result.violations, result.copies, result.statuses) == ([], 2, ["completed"])


@pytest.mark.parametrize("what", ["evict", "stop"])
@pytest.mark.parametrize("hold", [False, True])
def test_an_owner_stores_its_outcome_first_when_the_database_is_back(what: str, hold: bool) -> None:
    """The database is away for longer than a lease. Meanwhile the partition moves, and the reply comes."""
    plan = Plan(
        seed=1,
        tasks=(TaskPlan(0.0, smtp=("hang",)),),
        faults=(Fault(what, on="mail", nth=1), Fault("database", at=10.0, seconds=50.0)),
        replicas=(1, 1, 2, 1),
        hold=hold,
    )
    with prepared():
        result = try_plan(plan)
    assert (result.violations, result.copies, result.statuses) == ([], 1, ["completed"])


def test_a_draining_sender_waits_for_its_reply_without_a_busy_loop() -> None:
    plan = Plan(
        seed=1,
        tasks=(TaskPlan(0.0, smtp=("slow",)),),
        faults=(Fault("stop", on="mail", nth=1),),
        replicas=(1, 1, 1, 1),
    )
    with prepared():
        result = try_plan(plan)
    assert (result.violations, result.copies, result.statuses) == ([], 1, ["completed"])
