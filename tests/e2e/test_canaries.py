"""No secret and no recipient shows where it must not.

Unique secrets and addresses go through all services. Afterwards they are in no log, metric, command line or
`/readyz`, nor in what `replay` and `dead list` print.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from sqlalchemy import make_url

from services.common.kafka import topics
from tests.cli import Command
from tests.e2e.pipeline import until
from tests.stack import Stack

SERVICES = ("api-1", "validator-1", "sender-1", "status-1")
# One address for each way that a mail may go.
WAYS = {
    "ada+{}@good.test": "completed",
    "reject5+{}@good.test": "failed",
    "greylist+{}@good.test": "completed",
    "drop-after+{}@good.test": "completed",
    "{}@nowhere.test": "failed",
}


class Canaries:
    """Secrets that nothing else contains, by what they are."""

    def __init__(self, directory: Path) -> None:
        self.by_name: dict[str, str] = {}
        self._directory = directory

    def __call__(self, name: str) -> str:
        """Return a new canary."""
        self.by_name[name] = f"k{secrets.token_hex(16)}"
        return self.by_name[name]

    def file(self, name: str) -> str:
        """Return the path of a file with a new canary."""
        path = self._directory / name
        path.write_text(self(name) + "\n")
        return str(path)

    def found_in(self, text: str) -> list[str]:
        """Return the names of the canaries in a text, plain or in base64."""
        return [
            name
            for name, value in self.by_name.items()
            if value in text or base64.b64encode(value.encode()).decode().rstrip("=") in text
        ]


@pytest.fixture
def canaries(tmp_path: Path) -> Canaries:
    return Canaries(tmp_path)


@pytest.fixture
def stack(new_stack: Callable[..., Stack], canaries: Canaries) -> Stack:
    system = new_stack(
        POSTROAD_API_TOKENS=f"shop:{canaries('api token')}",
        POSTROAD_TOKEN_KEYS_FILE=canaries.file("token key"),
        POSTROAD_OPERATOR_TOKEN_FILE=canaries.file("operator token"),
        EMAIL_USER="ann",
        EMAIL_PASS_FILE=canaries.file("relay password"),
        POSTROAD_LOG_LEVEL="debug",
    )
    system.up()
    canaries.by_name["database password"] = make_url(system.env()["POSTROAD_DATABASE_URL"]).password or ""
    return system


def _http(stack: Stack, replica: str, path: str) -> str:
    address = stack.env()[f"POSTROAD_HTTP_{replica.upper().replace('-', '_')}"]
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
        text: str = response.read().decode()
        return text


def _command_lines(stack: Stack) -> str:
    """Return the command lines of the services and of the processes that they started."""
    pids = [str(stack.pid(replica)) for replica in SERVICES]
    for replica in SERVICES:
        for children in Path(f"/proc/{stack.pid(replica)}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids += children.read_text().split()
    lines = []
    for pid in pids:
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{pid}/cmdline").read_text())
    return "\n".join(lines)


def test_no_secret_and_no_recipient_shows(stack: Stack, canaries: Canaries, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(canaries.by_name["api token"] + "\n")
    postroad = Command(
        {
            "POSTROAD_ENV_FILE": str(stack.directory / "stack.env"),
            "POSTROAD_TOKEN_FILE": str(tmp_path / "token"),
        }
    )
    ids: dict[str, str] = {}
    for way, status in WAYS.items():
        mail = {
            "-S": canaries(f"subject {way}"),
            "-b": canaries(f"body {way}"),
            "-l": f"of={canaries(f'label {way}')}",
        }
        flags = [part for flag in mail.items() for part in flag]
        done = postroad("create", way.format(canaries(f"recipient {way}")), *flags, "-o", "json")
        assert done.code == 0, done.err
        ids[done.json["id"]] = status

    commands = set[str]()

    def settled() -> bool:
        commands.add(_command_lines(stack))
        rows: list[dict[str, Any]] = postroad("list", "-o", "json").json
        return {row["id"]: row["status"] for row in rows} == ids

    until(settled, "all settled", 90)
    # A record that no service wrote becomes a dead letter.
    producer = Producer({"bootstrap.servers": stack.env()["POSTROAD_KAFKA_BOOTSTRAP"]})
    producer.produce(stack.names.topic(topics.TASK_CREATED), b"\xff" + canaries("record").encode(), key=b"k")
    assert producer.flush(30) == 0
    dead: list[dict[str, Any]] = until(lambda: postroad("dead", "list", "--each", "-o", "json").json, "dead")

    shown = {
        "dead list": json.dumps(dead) + postroad("dead", "list").out,
        "command lines": "\n".join(commands),
    }
    for form in ("table", "json"):
        done = postroad("replay", topics.TASK_CREATED, "--yes", "-o", form)
        assert done.code == 0, done.err
        shown[f"replay as {form}"] = done.out + done.err
    for replica in SERVICES:
        shown[f"log of {replica}"] = stack.log(replica)
        assert '"event"' in stack.log(replica)
        for path in ("/metrics", "/readyz", "/healthz"):
            shown[f"{path} of {replica}"] = _http(stack, replica, path)
    assert "postroad_" in shown["/metrics of sender-1"]
    found = {where: names for where, text in shown.items() if (names := canaries.found_in(text))}
    assert not found

    # The database keeps the whole reply.
    refused = next(id_ for id_, status in ids.items() if status == "failed")
    assert (
        canaries.by_name["recipient reject5+{}@good.test"]
        in postroad("get", refused, "-o", "json").json["reply"]
    )
