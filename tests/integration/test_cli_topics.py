"""`postroad topics` on a real cluster."""

from __future__ import annotations

import json
import os
import subprocess

from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from services.common.config import Settings
from services.common.stages import all_topics
from tests import forked
from tests.api_process import eventually
from tests.cli import Command
from tests.stack import Infra

DELAYS = {"POSTROAD_VALIDATOR_DELAYS": "7", "POSTROAD_SENDER_DELAYS": "9"}


def postroad(bootstrap: str, prefix: str, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"POSTROAD_KAFKA_BOOTSTRAP": bootstrap, "POSTROAD_TOPIC_PREFIX": prefix}
    command = ("topics", *(command or ("apply", "--yes")))
    done = forked.run("services.cli", command, environment | {"POSTROAD_PARTITIONS": "2"} | more)
    return subprocess.CompletedProcess(command, *done)


def test_missing_topics_are_created_and_the_rest_is_compared(infra: Infra) -> None:
    prefix = infra.topic_prefix()
    settings = Settings(topic_prefix=prefix)
    names = sorted(topic.name for topic in all_topics(settings))
    first = postroad(infra.bootstrap, prefix)
    assert first.returncode == 0, first.stderr
    assert sorted(line.removeprefix("created ") for line in first.stdout.splitlines()[:-1]) == names
    known = AdminClient({"bootstrap.servers": infra.bootstrap}).list_topics(timeout=10).topics
    assert {len(known[name].partitions) for name in names} == {2}

    completing = {"_POSTROAD_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    words = postroad(infra.bootstrap, prefix, **completing, COMP_WORDS="postroad replay validator.delay.")
    there = (name.removeprefix(prefix) for name in names)
    assert words.stdout.split() == [name for name in there if name.startswith("validator.delay.")]

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


def test_a_short_retention_is_raised_a_longer_one_stays_and_any_other_setting_is_named(infra: Infra) -> None:
    prefix = infra.topic_prefix()
    assert postroad(infra.bootstrap, prefix, **DELAYS).returncode == 0
    short, for_ever, subject = f"{prefix}validator.delay.7", f"{prefix}mx.ok", f"{prefix}mail.sent"
    alter(infra.bootstrap, short, "retention.ms", "604800000")
    alter(infra.bootstrap, for_ever, "retention.ms", "-1")
    applied = postroad(infra.bootstrap, prefix, **DELAYS)
    assert (applied.returncode, applied.stderr) == (0, "")
    assert applied.stdout.splitlines() == [f"kept longer {short}", "The topics are as they must be."]
    admin = AdminClient({"bootstrap.servers": infra.bootstrap})
    eventually(lambda: setting_of(admin, short, "retention.ms") not in ("604800000", None))
    alter(infra.bootstrap, subject, "cleanup.policy", "compact")
    found = postroad(infra.bootstrap, prefix, **DELAYS)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.splitlines() == [f"differs {subject}: cleanup.policy is compact, wanted delete"]


def existing(bootstrap: str, prefix: str) -> dict[str, int]:
    known = AdminClient({"bootstrap.servers": bootstrap}).list_topics(timeout=10).topics
    return {name: len(topic.partitions) for name, topic in known.items() if name.startswith(prefix)}


def test_check_changes_nothing_and_names_each_difference(infra: Infra) -> None:
    prefix, delay = infra.topic_prefix(), DELAYS
    before = postroad(infra.bootstrap, prefix, "check", **delay)
    assert before.returncode == 1
    assert f"{prefix}task.created" in before.stdout
    assert existing(infra.bootstrap, prefix) == {}
    assert postroad(infra.bootstrap, prefix, **delay).returncode == 0
    fine = postroad(infra.bootstrap, prefix, "check", **delay)
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, "", "The topics are as they must be.\n")
    alter(infra.bootstrap, f"{prefix}validator.delay.7", "retention.ms", "604800000")
    alter(infra.bootstrap, f"{prefix}mx.ok", "cleanup.policy", "compact")
    more = DELAYS | {"POSTROAD_VALIDATOR_DELAYS": "7,8", "POSTROAD_PARTITIONS": "3"}
    for _ in range(2):
        found = postroad(infra.bootstrap, prefix, "check", "-o", "json", **more)
        assert found.returncode == 1
        rows = {(row["topic"].removeprefix(prefix), row["state"]) for row in json.loads(found.stdout)}
        assert {("validator.delay.8", "missing"), ("mx.ok", "differs"), ("mx.ok", "too small")} < rows
        assert ("validator.delay.7", "kept too short") in rows
    assert set(existing(infra.bootstrap, prefix).values()) == {2}


def test_apply_lists_what_it_will_do_and_asks(infra: Infra) -> None:
    prefix, delay = infra.topic_prefix(), DELAYS
    asked = postroad(infra.bootstrap, prefix, "apply", **delay)
    assert (asked.returncode, asked.stdout) == (2, "")
    *listed, last = asked.stderr.splitlines()
    assert f"create {prefix}mx.ok, 2 partitions" in listed
    assert "use --yes" in last
    assert existing(infra.bootstrap, prefix) == {}
    terminal = Command(
        {
            "POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap,
            "POSTROAD_TOPIC_PREFIX": prefix,
            "POSTROAD_PARTITIONS": "2",
            **delay,
        }
    )
    no = terminal.on_terminal("topics", "apply", typed="n\n")
    assert (no.code, no.out) == (1, "")
    assert no.err.splitlines() == [*listed, f"Change {len(listed)} topics? [y/N] postroad: nothing was done"]
    assert existing(infra.bootstrap, prefix) == {}
    assert terminal.on_terminal("topics", "apply", typed="y\n").code == 0
    assert len(existing(infra.bootstrap, prefix)) == len(listed)
    # Without anything to do it does not ask.
    assert postroad(infra.bootstrap, prefix, "apply", **delay).returncode == 0


def test_settings_that_are_not_given_come_from_the_cluster(infra: Infra) -> None:
    prefix = infra.topic_prefix()
    given = {"POSTROAD_VALIDATOR_DELAYS": "7", "POSTROAD_SENDER_DELAYS": "9,11"}
    assert postroad(infra.bootstrap, prefix, POSTROAD_PARTITIONS="1", **given).returncode == 0
    before = existing(infra.bootstrap, prefix)
    # An operator's environment has none of these settings.
    nothing = Command({"POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap, "POSTROAD_TOPIC_PREFIX": prefix})
    assert nothing("topics", "check").code == 0
    assert nothing("topics", "apply").code == 0
    assert existing(infra.bootstrap, prefix) == before
    admin = AdminClient({"bootstrap.servers": infra.bootstrap})
    admin.delete_topics([f"{prefix}mx.failed"])[f"{prefix}mx.failed"].result(20)
    eventually(lambda: f"{prefix}mx.failed" not in existing(infra.bootstrap, prefix))
    missing = nothing("topics", "check", "-o", "json")
    assert [(row["topic"], row["state"]) for row in missing.json] == [(f"{prefix}mx.failed", "missing")]
    assert nothing("topics", "apply", "--yes").code == 0
    assert existing(infra.bootstrap, prefix) == before
    # A given setting takes precedence.
    other = nothing("topics", "check", "-o", "json", POSTROAD_SENDER_DELAYS="9,12")
    assert [(row["topic"], row["state"]) for row in other.json] == [(f"{prefix}sender.delay.12", "missing")]


def test_an_unreachable_cluster_has_its_own_exit_code() -> None:
    away = postroad("127.0.0.1:1", "x.")
    assert away.returncode == 5
    assert len(away.stderr.splitlines()) == 1
