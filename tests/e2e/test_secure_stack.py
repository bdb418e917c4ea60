"""A secure stack: all works under the least rights, nobody does more, and no secret shows.

Unique secrets and addresses go through all services. Afterwards they are in no log, metric, command line or
`/readyz`, nor in what `replay` and `dead list` print.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from services.common.kafka import topics
from services.common.kafka.admin import SILENT_LOGGER
from services.common.operations.acls import PROGRAMS, required_acls
from tests.cli import Command
from tests.e2e.pipeline import until
from tests.stack import Stack, running

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


@pytest.fixture(scope="module")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> Canaries:
    return Canaries(tmp_path_factory.mktemp("canaries"))


@pytest.fixture(scope="module")
def stack(canaries: Canaries) -> Iterator[Stack]:
    """A secure system of these tests' own."""
    given = {
        "POSTROAD_API_TOKENS": f"shop:{canaries('api token')}",
        "POSTROAD_TOKEN_KEYS_FILE": canaries.file("token key"),
        "POSTROAD_OPERATOR_TOKEN_FILE": canaries.file("operator token"),
        "EMAIL_USER": "ann",
        "EMAIL_PASS_FILE": canaries.file("relay password"),
        "POSTROAD_LOG_LEVEL": "debug",
        "POSTROAD_PARTITIONS": "3",
    }
    with running(Stack(Path(tempfile.mkdtemp(prefix="postroad-")), given, secure=True)) as system:
        state = json.loads((system.directory / "state.json").read_text())
        canaries.by_name |= state["passwords"] | {"database administrator": state["password"]}
        yield Stack(system.directory)


@pytest.fixture
def postroad(stack: Stack, canaries: Canaries, tmp_path: Path) -> Command:
    (tmp_path / "token").write_text(canaries.by_name["api token"] + "\n")
    return Command(
        {
            "POSTROAD_ENV_FILE": str(stack.directory / "stack.env"),
            "POSTROAD_TOKEN_FILE": str(tmp_path / "token"),
        }
    )


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


def test_no_secret_and_no_recipient_shows(stack: Stack, canaries: Canaries, postroad: Command) -> None:
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
    _make_dead_letter(stack, canaries("record").encode())
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


def _make_dead_letter(stack: Stack, content: bytes) -> None:
    """Produce a record that no service wrote: the validator cannot decode it."""
    producer = Producer(stack.kafka)
    producer.produce(stack.names.topic(topics.TASK_CREATED), b"\xff" + content, key=b"k")
    assert producer.flush(30) == 0


def _topics(stack: Stack) -> set[str]:
    """Return the bare names of the stack's topics."""
    known = AdminClient(stack.kafka).list_topics(timeout=10).topics
    return {name for name in known if not name.startswith("__")}


def _may(program: str, operation: str, topic: str) -> bool:
    return any(
        acl.program == program
        and operation in acl.operations
        and acl.resource == "topic"
        and (topic.startswith(acl.name) if acl.pattern == "prefixed" else topic == acl.name)
        for acl in required_acls()
    )


def _config(stack: Stack, program: str) -> dict[str, Any]:
    return stack.kafka | stack.principal(program) | {"logger": SILENT_LOGGER}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_writes_no_topic_but_its_own(stack: Stack, program: str) -> None:
    denied = {topic for topic in _topics(stack) if not _may(program, "WRITE", topic)}
    errors = dict[str, Any]()
    producer = Producer(_config(stack, program) | {"message.timeout.ms": 10_000})

    def note(error: Any, record: Any) -> None:
        errors[record.topic()] = error

    for topic in denied:
        producer.produce(topic, b"forged", on_delivery=note)
    producer.flush(20)
    assert {topic for topic, error in errors.items() if error is not None} == denied


def _metadata_refused(consumer: Consumer, topic: str) -> bool:
    error = consumer.list_topics(topic, timeout=20).topics[topic].error
    return error is not None and error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_reads_no_topic_but_its_own(stack: Stack, program: str) -> None:
    denied = {topic for topic in _topics(stack) if not _may(program, "READ", topic)}
    consumer = Consumer(
        _config(stack, program)
        | {"group.id": "postroad.cli", "auto.offset.reset": "earliest", "enable.auto.commit": False}
    )
    refused = {topic for topic in denied if _metadata_refused(consumer, topic)}
    # It may describe what it writes.
    described = denied - refused
    consumer.assign([TopicPartition(topic, number, 0) for topic in described for number in range(3)])

    def all_refused() -> bool:
        for record in consumer.consume(100, 0.2):
            assert record.error() is not None, record.topic()
            if record.error().code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                refused.add(record.topic())
        return refused == denied

    until(all_refused, f"denied: {denied}", 60)
    consumer.close()


def test_a_program_joins_no_other_group(stack: Stack) -> None:
    consumer = Consumer(
        _config(stack, "status") | {"group.id": "postroad.sender", "group.protocol": "classic"}
    )
    errors = list[int]()
    consumer.subscribe([topics.MX_FAILED])

    def refused() -> bool:
        errors.extend(record.error().code() for record in consumer.consume(10, 0.2) if record.error())
        return KafkaError.GROUP_AUTHORIZATION_FAILED in errors

    until(refused, "denied", 60)
    consumer.close()


def test_nobody_comes_in_clear_or_without_a_password(stack: Stack) -> None:
    right = _config(stack, "operator")
    assert AdminClient(right).list_topics(timeout=10).topics
    wrong = [{"security.protocol": "plaintext"}, {"security.protocol": "ssl"}, {"sasl.password": "wrong"}]
    # Without the authority's certificate a client trusts the system's authorities alone.
    strange = {name: value for name, value in right.items() if name != "ssl.ca.location"}
    for config in (*(right | change for change in wrong), strange):
        with pytest.raises(KafkaException):
            AdminClient(config).list_topics(timeout=2)


def test_an_operator_changes_no_topic(postroad: Command) -> None:
    assert postroad("topics", "check").code in (1, 4)
    done = postroad("topics", "apply", "--grow", "--yes", POSTROAD_PARTITIONS="4")
    assert done.code == 4, done.err


def test_the_operators_commands_work(stack: Stack, postroad: Command) -> None:
    assert postroad("lag", "-o", "json").code == 0
    assert postroad("lag", "--stage", "sender", "--domains", "-o", "json").code == 0
    done = postroad("rebuild", "--yes", "-o", "json")
    assert done.code == 0, done.err
    _make_dead_letter(stack, b"garbage")
    until(lambda: postroad("dead", "list", "--stage", "validator", "-o", "json").json, "a dead letter")
    assert postroad("dead", "purge", "--stage", "validator", "--yes").code == 0


def test_only_its_owner_reads_the_stacks_secrets(stack: Stack) -> None:
    for path in (stack.directory / "secure").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    environment = Path(f"/proc/{stack.pid('validator-1')}/environ").read_text()
    state = json.loads((stack.directory / "state.json").read_text())
    assert not [name for name, password in state["passwords"].items() if password in environment]
    assert "POSTROAD_DATABASE_URL" not in environment
