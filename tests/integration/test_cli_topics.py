"""`postroad topics apply` on a real cluster."""

from __future__ import annotations

import os
import subprocess

from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from services.common import topics
from services.common.config import Settings
from tests import forked
from tests.api_process import eventually
from tests.stack import Infra


def postroad(bootstrap: str, prefix: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"POSTROAD_KAFKA_BOOTSTRAP": bootstrap, "POSTROAD_TOPIC_PREFIX": prefix}
    command = ("topics", "apply")
    done = forked.run("services.cli", command, environment | {"POSTROAD_PARTITIONS": "2"} | more)
    return subprocess.CompletedProcess(command, *done)


def test_missing_topics_are_created_and_the_rest_is_compared(infra: Infra) -> None:
    prefix = infra.topic_prefix()
    names = sorted(topic.name for topic in topics.wanted(Settings(topic_prefix=prefix)))
    first = postroad(infra.bootstrap, prefix)
    assert first.returncode == 0, first.stderr
    assert sorted(line.removeprefix("created ") for line in first.stdout.splitlines()[:-1]) == names
    known = AdminClient({"bootstrap.servers": infra.bootstrap}).list_topics(timeout=10).topics
    assert {len(known[name].partitions) for name in names} == {2}

    again = postroad(infra.bootstrap, prefix)
    assert (again.returncode, again.stdout) == (0, "The topics are as they must be.\n"), again.stderr

    other = postroad(infra.bootstrap, prefix, POSTROAD_PARTITIONS="3")
    assert (other.returncode, other.stdout) == (1, "")
    assert f"differs {prefix}mx.ok: 2 partitions, wanted 3" in other.stderr.splitlines()


def alter(bootstrap: str, topic: str, setting: str, value: str) -> None:
    entry = ConfigEntry(setting, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for done in admin.incremental_alter_configs([resource]).values():
        done.result(10)
    eventually(lambda: setting_of(admin, topic, setting) == value)


def setting_of(admin: AdminClient, topic: str, setting: str) -> str | None:
    [described] = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
    value: str | None = described.result(10)[setting].value
    return value


def test_a_setting_that_differs_is_named(infra: Infra) -> None:
    prefix = infra.topic_prefix()
    assert postroad(infra.bootstrap, prefix, POSTROAD_VALIDATOR_DELAYS="7").returncode == 0
    subject = f"{prefix}mx.ok"
    alter(infra.bootstrap, subject, "cleanup.policy", "compact")
    found = postroad(infra.bootstrap, prefix, POSTROAD_VALIDATOR_DELAYS="7")
    assert found.returncode == 1
    assert found.stderr.splitlines() == [f"differs {subject}: cleanup.policy is compact, wanted delete"]


def test_a_retention_that_is_too_short_is_raised_and_a_longer_one_stays(infra: Infra) -> None:
    prefix = infra.topic_prefix()
    assert postroad(infra.bootstrap, prefix, POSTROAD_VALIDATOR_DELAYS="7").returncode == 0
    short, for_ever = f"{prefix}validator.delay.7", f"{prefix}mx.ok"
    alter(infra.bootstrap, short, "retention.ms", "604800000")
    alter(infra.bootstrap, for_ever, "retention.ms", "-1")
    applied = postroad(infra.bootstrap, prefix, POSTROAD_VALIDATOR_DELAYS="7")
    assert (applied.returncode, applied.stderr) == (0, "")
    assert applied.stdout.splitlines() == [f"kept longer {short}", "The topics are as they must be."]
    admin = AdminClient({"bootstrap.servers": infra.bootstrap})
    eventually(lambda: setting_of(admin, short, "retention.ms") not in ("604800000", None))
    again = postroad(infra.bootstrap, prefix, POSTROAD_VALIDATOR_DELAYS="7")
    assert (again.returncode, again.stdout) == (0, "The topics are as they must be.\n")


def test_a_cluster_that_is_away_is_told_by_the_exit_code() -> None:
    away = postroad("127.0.0.1:1", "x.")
    assert away.returncode == 5
    assert len(away.stderr.splitlines()) == 1
