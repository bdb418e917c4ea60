"""compose.yaml fits the code: it hands on the settings that there are, and waits for a drain."""

import re
from pathlib import Path

from deploy.local.database import FLAGS, KIND_FLAGS
from services.common.config import Settings

COMPOSE = (Path(__file__).parents[2] / "compose.yaml").read_text()

# What a system of one broker, whose containers name themselves, has no use for; and the times that
# `stop_grace_period` is made for.
NOT_HANDED_ON = {
    "POSTROAD_REPLICATION",
    "POSTROAD_TOPIC_PREFIX",
    "POSTROAD_REPLICA",
    "POSTROAD_DRAIN_SECONDS",
    "POSTROAD_REVOKE_SECONDS",
}


def test_every_setting_reaches_a_container() -> None:
    settings = {
        str(field.validation_alias or f"POSTROAD_{name.upper()}")
        for name, field in Settings.model_fields.items()
    }
    handed_on = set(re.findall(r"^ +((?:POSTROAD|EMAIL)_\w+):", COMPOSE, re.MULTILINE))
    assert handed_on == settings - NOT_HANDED_ON


def test_a_stage_may_drain_before_it_is_killed() -> None:
    [stage] = re.findall(r"^x-stage:.*?^services:", COMPOSE, re.MULTILINE | re.DOTALL)
    [grace] = re.findall(r"stop_grace_period: (\d+)s", stage)
    assert int(grace) >= Settings.model_fields["drain_seconds"].default + 10


def test_the_database_is_as_strict_as_the_strictest_that_postroad_meets() -> None:
    strict = "--max-allowed-packet=16M", "--sql-require-primary-key=ON"
    assert not set(strict) - {*FLAGS, *KIND_FLAGS["mysql"]}
    assert all(flag in COMPOSE for flag in strict)
