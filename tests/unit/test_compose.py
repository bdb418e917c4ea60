"""compose.yaml and the local stack fit the code: they wait for a drain, and the databases are strict."""

import re
from pathlib import Path

from deploy.local.database import FLAGS, KIND_FLAGS
from deploy.local.services import DRAIN_SECONDS
from services.common.config import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "compose.yaml").read_text()
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text()
LOCAL = ROOT / "deploy/local"


def test_a_stage_has_time_to_drain_before_it_is_killed() -> None:
    [stage] = re.findall(r"^x-stage:.*?^services:", COMPOSE, re.MULTILINE | re.DOTALL)
    [grace] = re.findall(r"stop_grace_period: (\d+)s", stage)
    assert int(grace) >= _default("drain_seconds") + 10


def test_the_database_is_as_strict_as_any_supported_one() -> None:
    strict = "--max-allowed-packet=16M", "--sql-require-primary-key=ON"
    assert not set(strict) - {*FLAGS, *KIND_FLAGS["mysql"]}
    assert all(flag in COMPOSE for flag in strict)


def test_a_sender_has_time_for_the_replies_to_its_handovers_before_it_is_killed() -> None:
    [sender] = re.findall(r"^  sender:.*?^  status:", COMPOSE, re.MULTILINE | re.DOTALL)
    [grace] = re.findall(r"stop_grace_period: (\d+)s", sender)
    assert int(grace) >= _default("drain_seconds") + _default("handover_seconds") + 40


def test_the_validator_knows_the_domains_of_the_readme() -> None:
    """No real name server knows `good.test`. A name server of the user's own comes first."""
    servers = dict(re.findall(r"^  (\w+):\n((?:    .*\n|\n)+)", COMPOSE, re.MULTILINE))
    assert "POSTROAD_DNS_SERVERS: ${POSTROAD_DNS_SERVERS-dns:5353}" in servers["validator"]
    assert "target: dns" in servers["dns"]
    [command] = re.findall(r"^FROM runtime AS dns\n(?:.+\n)*CMD (.*)$", DOCKERFILE, re.MULTILINE)
    assert '"0.0.0.0:5353", "--forward"' in command
    # The container needs the modules that the name server imports.
    copied = set(re.findall(r"deploy/local/(\w+)\.py", DOCKERFILE))
    imported = {
        name
        for module in copied
        for name in re.findall(
            r"^from deploy\.local\.(\w+) import", (LOCAL / f"{module}.py").read_text(), re.M
        )
    }
    assert copied == imported | {"__init__", "dns"}
    assert {f"!deploy/local/{name}.py" for name in copied} <= set(IGNORED.splitlines())


def test_the_local_stack_waits_as_long() -> None:
    assert {
        f"POSTROAD_{name.upper()}": _default(name) for name in ("drain_seconds", "handover_seconds")
    } == DRAIN_SECONDS


def _default(name: str) -> float:
    return float(Settings.model_fields[name].default)
