"""Runs the commands of README.md and docs/operations.md word for word on a running stack.

A word in capitals (ID, REASON, HOST:PORT) stands for something that only the reader has, and so does
`tasks.example`. The test replaces it by a real one. tests/e2e/test_compose.py runs the commands of Docker.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Message, Producer
from google.protobuf.timestamp_pb2 import Timestamp

from postroad.v1 import events_pb2
from services.common import taskstore
from services.common.database.engine import make_engine
from services.common.events import encode
from services.common.grants import parse_grants
from services.common.kafka.headers import dead_letter_headers
from services.common.kafka.topic_partition import RecordLocation
from tests.documents import ROOT, commands, programs, python_samples
from tests.e2e.pipeline import Pipeline, until
from tests.shell import Done, Shell
from tests.stack import Infra, Stack, further, running

DOCUMENTS = ("README.md", "docs/operations.md")

# Commands that cannot run here, by how they begin, with the reason.
CANNOT = {
    "docker ": "needs Docker: tests/e2e/test_compose.py",
    "POSTROAD_DOMAIN_CONCURRENCY=2 POSTROAD_DOMAIN_RATE=5 docker ": "needs Docker: tests/e2e/test_compose.py",
    "make demo": "tests/integration/test_local_stack_demo.py runs it",
    "make test": "this is a part of it",
    "make bench": "measures for minutes",
    "make clean": "deletes the clone's .venv",
    ".venv/bin/postroad --env-file .local/stack.env create --batch": "reads a file: tests/e2e/test_cli.py",
    ".venv/bin/postroad --env-file .local/stack.env watch": "runs until a task ends: tests/e2e/test_cli.py",
    "kafka-": "Kafka's own tools are not in the local stack",
    "python3 -m deploy.local start mysql": "its MySQL is the run's: tests/integration/test_local_stack.py",
    "python3 -m deploy.local start kafka-1": "its Kafka is the run's: tests/integration/test_local_stack.py",
    "python3 -m deploy.local up --secure": "its servers are the run's: tests/e2e/test_secure_stack.py",
    "postroad --install-completion": "changes the shell that it is called from",
    "postroad lag --watch": "runs until Ctrl-C: tests/e2e/test_cli.py",
}
# Exit codes other than 0, which the documents name.
CODES = {"POSTROAD_PARTITIONS=24 postroad topics check": 1}
# These change what all others find, and the last of them stops the stack.
LATE = (
    "POSTROAD_API_TOKENS=",
    "grpcurl -plaintext -H 'authorization:",
    "POSTROAD_TOKENS_FILE=",
    "POSTROAD_TLS_CERT=",
    "POSTROAD_TOKEN=",
    ".venv/bin/postroad token revoke",
    "POSTROAD_PARTITIONS=24 postroad topics ",
    "make down",
)

ALL = [command for document in DOCUMENTS for command in commands(document)]
HERE = sorted(
    (c for c in dict.fromkeys(c.text for c in ALL) if not c.startswith(tuple(CANNOT))),
    key=lambda text: next((n for n, start in enumerate(LATE, 1) if text.startswith(start)), 0),
)
LAGS = [text for text in HERE if re.search(r"\bpostroad (?:--env-file \S+ )?lag\b", text)]


class Field:
    """The stack, with tasks and dead letters for the commands to work on."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.stack, self.env = stack, stack.env()
        self.pipeline = Pipeline(stack)
        here = {"POSTROAD_LOCAL_DIR": str(stack.directory), "POSTROAD_ENV_FILE": ".local/stack.env"}
        self.shell = Shell(directory, stack.directory, here)
        profile = directory / ".config/postroad/config.toml"
        profile.parent.mkdir(parents=True)
        profile.write_text(f'[profiles.production]\napi = "{self.env["POSTROAD_API"]}"\n')
        profile.chmod(0o600)
        self.rejected = [self.pipeline.create("reject5@good.test") for _ in range(2)]
        self.doubtful = [self.pipeline.create("drop-lost-always@good.test") for _ in range(4)]
        self.replay = self.token = ""
        self._lags: dict[str, Future[Done]] = {}
        self._lagging = ThreadPoolExecutor(3)
        self._engine = make_engine(stack.database, pool_size=1)

    def close(self) -> None:
        """Close its connections."""
        self._lagging.shutdown()
        self._engine.dispose()

    def sql(self, statement: str) -> None:
        """Run a statement of SQL; raises sqlalchemy.exc.DBAPIError."""
        with self._engine.connect() as connection:
            connection.exec_driver_sql(statement).all()

    def lag(self, text: str) -> Done:
        """Run a command that shows lag. Each watches for two seconds, so some run ahead of their tests."""
        if not self._lags:
            self._lags = {each: self._lagging.submit(self.shell.run, each) for each in LAGS}
        return self._lags[text].result()

    def scheduled(self, **more: Any) -> str:
        """Create a task that no sender sends meanwhile; return its id."""
        later = Timestamp(seconds=int(time.time()) + 3600)
        from postroad.v1 import task_service_pb2 as pb

        data = pb.TaskData(email="later@good.test", subject="Later", body="Later.", **more)
        return str(self.pipeline.stub.Create(pb.CreateRequest(data=data, send_at=later), timeout=20).id)

    def ended(self, ids: list[str], status: str) -> str:
        """Wait until these tasks have ended as `status`; remove the first from the list and return it."""
        until(
            lambda: all(self.pipeline.get(id_).status == status for id_ in ids),
            f"tasks that are {status}",
            30,
        )
        return ids.pop(0)

    def dead_letter(self) -> str:
        """Produce a dead letter with the cause of the examples; return its location."""
        id_ = bytes.fromhex(self.scheduled().replace("-", ""))
        with self._engine.connect() as connection:
            task = taskstore.load_tasks(connection, [id_])[id_]
        record = encode(events_pb2.MxOk(task=task, attempt=1), "validator", None)
        headers = dead_letter_headers(
            record.headers, origin=RecordLocation("mx.ok", 0, 0), attempt=1, cause="KeyError: 'name'"
        )
        written: list[Message] = []
        producer = Producer(self.stack.kafka)
        producer.produce(
            self.stack.names.dead("sender"),
            record.value,
            record.key,
            headers=headers,
            on_delivery=lambda error, message: written.append(message),
        )
        assert producer.flush(20) == 0
        return f"sender/{written[0].partition()}/{written[0].offset()}"


@pytest.fixture(scope="module")
def field(infra: Infra, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    with running(further(infra, POSTROAD_LOCAL_API_PORT="50051")) as stack:
        field = Field(stack, tmp_path_factory.mktemp("reader"))
        with field.shell, field.pipeline, closing(field):
            yield field


def run(field: Field, text: str) -> Done:
    """Run a command after preparing what it needs."""
    if text in LAGS:
        return field.lag(text)
    if "dead " in text:
        location = field.dead_letter()
        text = text.replace("sender/3/17", location)
    if "template=NAME" in text:
        field.scheduled(labels={"template": "NAME"})
    if " --reason REASON " in text and "xargs" in text:
        field.ended([*field.rejected], "failed")
    typed = re.sub(r"\bID\b", lambda _: task_for(field, text), text)
    for example, real in {
        "127.0.0.1:50051": field.env["POSTROAD_API"],
        "tasks.example:50051": field.env["POSTROAD_API"],
        # Each further partition costs the broker files; tests/e2e/test_grow.py grows to many.
        "POSTROAD_PARTITIONS=24": "POSTROAD_PARTITIONS=4",
        "POSTROAD_TOKEN=TOKEN": f"POSTROAD_TOKEN={field.token}",
        "HOST:PORT": field.env["POSTROAD_HTTP_SENDER_1"],
        "--reason REASON": "--reason rejected",
        "DOMAIN": "good.test",
        "TOPIC": "mx.ok",
    }.items():
        typed = re.sub(rf"(?<!\w){re.escape(example)}\b", real, typed)
    # On a secure stack, an operator neither changes topics nor migrates.
    user = field.stack.topics_user if "postroad topics " in text else {}
    if " migrate" in text:
        user = {"POSTROAD_DATABASE_URL": field.stack.database}
    done = field.shell.run(typed.removesuffix(" ..."), **user)
    if begun := re.search(r"Replay (\S+) begins", done.errors):
        field.replay = begun[1]
    if " token new " in text:
        field.token = done.output.strip()
    return done


def task_for(field: Field, text: str) -> str:
    """Return the id of a task, or of a replay, that this command is for."""
    if "--resume" in text:
        return field.replay
    if " token revoke " in text:
        return parse_grants((field.shell.directory / ".local/tokens").read_text())[0].id
    if " resolve " in text:
        return field.ended(field.doubtful, "uncertain")
    if " retry " in text:
        return field.ended(field.rejected, "failed")
    return field.scheduled()


# What a sample prints, by whether it creates a task.
EXPECTED = {True: r"sender sent 250 ", False: r"'completed': \d"}


@pytest.mark.parametrize("sample", python_samples("README.md"))
def test_a_python_sample_prints_its_result(
    field: Field, sample: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(sample.replace("127.0.0.1:50051", field.env["POSTROAD_API"]), "README.md", "exec"), {})
    assert re.search(EXPECTED[".Create" in sample], capsys.readouterr().out)


@pytest.mark.parametrize("text", HERE)
def test_a_documented_command_succeeds(field: Field, text: str) -> None:
    program = re.split(r"[ \n]", re.sub(r"^(?:[A-Z_]+=\S+ )*", "", text))[0]
    if text.startswith("SELECT"):
        field.sql(text)
        return
    for needed in {program, *(word for word in ("jq", "curl") if f"{word} " in text)} - {
        ".venv/bin/postroad"
    }:
        if needed not in {"postroad", "grpcurl"} and not shutil.which(needed):
            pytest.skip(f"{needed} is not installed")
    done = run(field, text)
    assert done.code == CODES.get(text, 0), f"{done.output}\n{done.errors}"
    if " postroad.v1.TaskService/Create" in text:
        until(lambda: "ada@good.test" in str(field.stack.journal()), "the mail of the README", 30)
    if restore := RESTORES.get(text):
        restore(field)


def _one_sender(field: Field) -> None:
    field.stack.scale("sender", 1)


# These restore what a command took away and others need.
RESTORES: dict[str, Callable[[Field], None]] = {
    "python3 -m deploy.local scale sender 0": _one_sender,
    "python3 -m deploy.local scale sender 3": _one_sender,
}


def test_every_line_of_a_code_block_is_a_command_or_known() -> None:
    assert programs("README.md") == set()
    assert programs("docs/operations.md") == {'{"version":'}


@pytest.mark.parametrize("begin", CANNOT)
def test_a_skipped_command_is_in_a_document(begin: str) -> None:
    assert any(command.text.startswith(begin) for command in ALL)


def test_python_is_called_by_the_name_that_debian_has() -> None:
    for document in DOCUMENTS:
        assert not re.findall(r"(?<![\w/.])python -m", (ROOT / document).read_text())
