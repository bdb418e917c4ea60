"""compose.yaml and the local stack fit the code: they wait for a drain, and the databases are strict."""

import re
from pathlib import Path

from deploy.local.database import FLAGS, KIND_FLAGS
from deploy.local.services import PATIENCE
from services.common.config import Settings

COMPOSE = (Path(__file__).parents[2] / "compose.yaml").read_text()


def test_a_stage_may_drain_before_it_is_killed() -> None:
    [stage] = re.findall(r"^x-stage:.*?^services:", COMPOSE, re.MULTILINE | re.DOTALL)
    [grace] = re.findall(r"stop_grace_period: (\d+)s", stage)
    assert int(grace) >= _default("drain_seconds") + 10


def test_the_database_is_as_strict_as_the_strictest_that_postroad_meets() -> None:
    strict = "--max-allowed-packet=16M", "--sql-require-primary-key=ON"
    assert not set(strict) - {*FLAGS, *KIND_FLAGS["mysql"]}
    assert all(flag in COMPOSE for flag in strict)


def test_a_sender_may_wait_for_what_it_handed_over_before_it_is_killed() -> None:
    [sender] = re.findall(r"^  sender:.*?^  status:", COMPOSE, re.MULTILINE | re.DOTALL)
    [grace] = re.findall(r"stop_grace_period: (\d+)s", sender)
    assert int(grace) >= _default("drain_seconds") + _default("handover_seconds") + 40


def test_the_local_stack_waits_as_long() -> None:
    assert {
        f"POSTROAD_{name.upper()}": _default(name) for name in ("drain_seconds", "handover_seconds")
    } == PATIENCE


def _default(name: str) -> float:
    return float(Settings.model_fields[name].default)
