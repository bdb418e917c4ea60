"""A short run on the real stack, and runs of broken variants that must fail.

Each takes minutes, so only `make test-long` runs them. `make test` has each of these faults by itself
(tests/e2e/test_kills.py and test_outages.py). It has mixtures of them and broken variants in memory
(tests/simulation), and the rules of the checker (test_checker.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.plan import Fault
from tests.chaos.report import show
from tests.chaos.runner import Run, run
from tests.forms import LONG

pytestmark = pytest.mark.skipif(not LONG, reason="minutes long: make test-long")

# The machine may run other things too. Recoveries may take longer then; losses are never allowed.
SLACK = 60.0
# The faults that lose and duplicate mails most easily, in little more than a minute.
FAULTS = (
    Fault(6, "kill", "mysql", 2),
    Fault(9.5, "scale", "status", 0, "3", alone=False),
    Fault(20, "reset", "smtp", 9.5),
    Fault(28, "scale", "sender", 0, "3", alone=False),
    Fault(37, "mail", "catcher", 5, "drop-after", alone=False),
    Fault(40, "kill", "sender-2", 0.7, alone=False),
    Fault(46, "scale", "status", 0, "2", alone=False),
    Fault(48, "restart", "mysql", 0, alone=False),
    Fault(50.5, "kill", "kafka-1", 14, alone=False),
)


@pytest.mark.timeout(600)
def test_nothing_is_lost_and_nothing_sent_twice(tmp_path: Path) -> None:
    verdict, evidence = run(Run(1, 75, FAULTS, rate=25, slack=SLACK), tmp_path)
    show([(verdict, evidence, tmp_path)])
    assert verdict.ok, verdict.breaches[:20]
    assert verdict.acknowledged > 1000
    assert verdict.settled + verdict.deferred == verdict.acknowledged


def killed_again_and_again(target: str, times: int) -> list[Fault]:
    """Return a plan that kills the only replica of a service during slow mails."""
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
