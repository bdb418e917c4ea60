"""What `postroad acl print` shows. The secure stack runs under these rules, so they are enough."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict

import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.common.config import Settings
from services.common.operations.acls import PROGRAMS, required_acls
from services.common.stages import STAGES, all_topics


def _covers(name: str, pattern: str, topic: str) -> bool:
    return topic.startswith(name) if pattern == "prefixed" else topic == name


def test_every_topic_is_created_written_and_read() -> None:
    settings = Settings(topic_prefix="x.")
    allowed = defaultdict(set)
    for acl in required_acls("x."):
        assert acl.name.startswith("x.")
        for topic in all_topics(settings):
            if acl.resource == "topic" and _covers(acl.name, acl.pattern, topic.name):
                allowed[topic.name] |= {(acl.program, operation) for operation in acl.operations}
    for topic in all_topics(settings):
        operations = {operation for _, operation in allowed[topic.name]}
        assert {"CREATE", "READ", "WRITE"} <= operations, topic.name


def test_a_service_writes_only_its_own_topics() -> None:
    writes = defaultdict(set)
    for acl in required_acls():
        assert acl.program in PROGRAMS
        if "WRITE" in acl.operations:
            writes[acl.program].add(acl.name)
    assert writes["api"] == {"task.created", "task.cancelled", "mail.sent", "mail.failed"}
    assert writes["validator"] == {
        "mx.ok",
        "mx.failed",
        "mail.deferred",
        "validator.delay.",
        "validator.dead",
    }
    assert writes["sender"] == {"mail.sent", "mail.deferred", "mail.failed", "sender.delay.", "sender.dead"}
    assert writes["status"] == {"status.dead"}
    assert "topics" not in writes


def test_only_a_stage_joins_its_group() -> None:
    groups = [acl for acl in required_acls() if acl.resource == "group"]
    joins = {(acl.program, acl.name) for acl in groups if "READ" in acl.operations}
    assert joins == {(stage, f"postroad.{stage}") for stage in STAGES}


def test_the_command_prints_rows_or_lines_for_a_shell() -> None:
    run = CliRunner().invoke
    rows = json.loads(run(app, ["acl", "print", "--topic-prefix", "x.", "-o", "json"]).stdout)
    assert {row["principal"] for row in rows} == {f"User:postroad-{program}" for program in PROGRAMS}
    lines = run(app, ["acl", "print", "--commands", "--principal", "User:CN={program}"]).stdout.splitlines()
    assert len(lines) == len(rows)
    words = shlex.split(next(line for line in lines if "sender.delay." in line and "sender " in line))
    assert words[0] == "kafka-acls.sh"
    assert words[words.index("--allow-principal") + 1] == "User:CN=sender"
    assert words[-4:] == ["--topic", "sender.delay.", "--resource-pattern-type", "prefixed"]


@pytest.mark.parametrize("principal", ["User:all", ""])
def test_each_program_has_a_principal_of_its_own(principal: str) -> None:
    done = CliRunner().invoke(app, ["acl", "print", "--principal", principal])
    assert done.exit_code != 0
