"""A short form of chaos on the real stack, and broken variants that it must find broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.plan import Fault, plan
from tests.chaos.report import show
from tests.chaos.runner import Run, run

# A machine that runs other things beside: what is measured may take longer there, what is lost may not.
SLACK = 60.0
# A plan that kills a sender, MySQL and a broker, and cuts connections, in little more than a minute.
SEED = 2357


@pytest.mark.timeout(600)
def test_nothing_is_lost_and_nothing_sent_twice(tmp_path: Path) -> None:
    targets = ["validator", "sender", "status", "api", "mysql", "kafka", "network", "mail", "scale"]
    faults = plan(SEED, 75, targets)
    kills = {fault.target.partition("-")[0] for fault in faults if fault.kind == "kill"}
    assert kills >= {"sender", "mysql", "kafka"}, "another seed is needed for the plans of today"
    verdict, evidence = run(Run(SEED, 75, faults, rate=25, slack=SLACK), tmp_path)
    show(SEED, verdict, evidence, tmp_path)
    assert verdict.ok, verdict.breaches[:20]
    assert verdict.acknowledged > 1000
    assert verdict.settled + verdict.deferred == verdict.acknowledged


def killed_again_and_again(target: str, times: int) -> list[Fault]:
    """A plan that kills the only replica of a service in the midst of slow mails."""
    slow = Fault(4, "mail", "catcher", 8.0 * times + 4, "slow-800", alone=False)
    kills = [Fault(8 + 8 * turn, "kill", target, 0.5, alone=False) for turn in range(times)]
    return [slow, *kills]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mutant", "rule"), [("sender_without_claims", "copies"), ("sender_commits_first", "lost")]
)
def test_a_broken_sender_is_found(mutant: str, rule: str, tmp_path: Path) -> None:
    faults = killed_again_and_again("sender-1", 2)
    spec = Run(1, 26, faults, rate=40, mutant=mutant, settle=20, kafka_nodes=1)
    verdict, _ = run(spec, tmp_path)
    assert rule in {broken for broken, _ in verdict.breaches}
