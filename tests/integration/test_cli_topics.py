"""`postroad topics apply` on a real cluster."""

from __future__ import annotations

import os
import subprocess
import sys

from confluent_kafka.admin import AdminClient

from services.common import topics
from services.common.config import Settings
from tests.stack import Infra


def postroad(bootstrap: str, prefix: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"POSTROAD_KAFKA_BOOTSTRAP": bootstrap, "POSTROAD_TOPIC_PREFIX": prefix}
    return subprocess.run(
        [sys.executable, "-m", "services.cli", "topics", "apply"],
        env=environment | {"POSTROAD_PARTITIONS": "2"} | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


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


def test_a_setting_that_differs_is_named(infra: Infra) -> None:
    prefix = infra.topic_prefix()
    assert postroad(infra.bootstrap, prefix, POSTROAD_VALIDATOR_DELAYS="7").returncode == 0
    subject = f"{prefix}mx.ok"
    admin = AdminClient({"bootstrap.servers": infra.bootstrap})
    from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

    entry = ConfigEntry("retention.ms", "1000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, subject, incremental_configs=[entry])
    for done in admin.incremental_alter_configs([resource]).values():
        done.result(10)
    found = postroad(infra.bootstrap, prefix, POSTROAD_VALIDATOR_DELAYS="7")
    assert found.returncode == 1
    assert found.stderr.splitlines() == [f"differs {subject}: retention.ms is 1000, wanted 2592000000"]


def test_a_cluster_that_is_away_is_told_by_the_exit_code() -> None:
    away = postroad("127.0.0.1:1", "x.")
    assert away.returncode == 5
    assert len(away.stderr.splitlines()) == 1
