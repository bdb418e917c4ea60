"""compose.yaml fits the code: it waits for a drain, and its database is strict."""

import re
from pathlib import Path

from deploy.local.database import FLAGS, KIND_FLAGS
from services.common.config import Settings

COMPOSE = (Path(__file__).parents[2] / "compose.yaml").read_text()


def test_a_stage_may_drain_before_it_is_killed() -> None:
    [stage] = re.findall(r"^x-stage:.*?^services:", COMPOSE, re.MULTILINE | re.DOTALL)
    [grace] = re.findall(r"stop_grace_period: (\d+)s", stage)
    assert int(grace) >= Settings.model_fields["drain_seconds"].default + 10


def test_the_database_is_as_strict_as_the_strictest_that_postroad_meets() -> None:
    strict = "--max-allowed-packet=16M", "--sql-require-primary-key=ON"
    assert not set(strict) - {*FLAGS, *KIND_FLAGS["mysql"]}
    assert all(flag in COMPOSE for flag in strict)
