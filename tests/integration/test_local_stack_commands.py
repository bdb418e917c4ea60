"""`python3 -m deploy.local`: the contract of its commands, its files and its environment variables."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import mysql.connector
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from sqlalchemy import make_url

from deploy.local.state import SERVICES
from postroad.v1.task_service_pb2 import ListRequest
from postroad.v1.task_service_pb2_grpc import TaskServiceStub
from services.common.kafka.topics import TASK_CREATED
from tests.forms import LONG
from tests.stack import Infra, Stack

NewStack = Callable[..., Stack]


def _running(stack: Stack) -> set[str]:
    lines = stack.command("status", check=False).stdout.splitlines()[1:]
    return {line.split()[0] for line in lines if " running " in line}


def _environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.partition("=")[::2] for pair in pairs)


def _query(stack: Stack, statement: str) -> list[tuple[object, ...]]:
    url = make_url(stack.env()["POSTROAD_DATABASE_URL"])
    with (
        mysql.connector.connect(
            host=url.host, port=url.port, user=url.username, password=url.password, database=url.database
        ) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(statement)
        rows = cursor.fetchall()
        connection.commit()
        return list(rows)


def _partitions(stack: Stack) -> str:
    topic = stack.names.topic(TASK_CREATED)
    admin = AdminClient({"bootstrap.servers": stack.env()["POSTROAD_KAFKA_BOOTSTRAP"]})
    return str(len(admin.list_topics(topic, timeout=20).topics[topic].partitions))


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_every_service_is_ready_when_up_returns(stack: Stack) -> None:
    env = stack.env()
    for service in SERVICES:
        name = f"{service}-1"
        with urllib.request.urlopen(f"http://{env[f'POSTROAD_HTTP_{service.upper()}_1']}/readyz") as answer:
            assert answer.status == 200
        environment = _environment(stack.pid(name))
        assert environment["POSTROAD_LOCAL_DIR"] == str(stack.directory)
        assert environment["POSTROAD_REPLICA"] == name
        assert f"services.{service}" in Path(f"/proc/{stack.pid(name)}/cmdline").read_text()
    assert _environment(stack.pid("api-1"))["POSTROAD_LISTEN"] == env["POSTROAD_API"]


def test_scale_starts_and_drains_replicas(stack: Stack) -> None:
    first = stack.pid("sender-1")
    stack.scale("sender", 2)
    assert {"sender-1", "sender-2"} <= _running(stack)
    assert "POSTROAD_HTTP_SENDER_2" in stack.env()
    stack.scale("sender", 1)
    assert {name for name in _running(stack) if name.startswith("sender")} == {"sender-1"}
    assert "POSTROAD_HTTP_SENDER_2" not in stack.env()
    assert stack.pid("sender-1") == first


def test_a_service_restarts_on_its_port(stack: Stack) -> None:
    env = stack.env()
    for name, end in (("api-1", stack.kill), ("validator-1", stack.stop)):
        end(name)
        assert name not in _running(stack)
        stack.start(name)
        assert name in _running(stack)
    assert stack.env() == env


def test_unknown_names_are_refused(stack: Stack) -> None:
    for arguments in (("start", "sender-9"), ("stop", "nothing"), ("logs", "nothing")):
        done = stack.command(*arguments, check=False)
        assert done.returncode == 1
        assert "sender-1" in done.stderr
    assert stack.command("scale", "postman", "2", check=False).returncode == 2


def test_a_server_that_the_environment_names_is_not_started(new_servers: NewStack, infra: Infra) -> None:
    given = {
        "POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap,
        "POSTROAD_DATABASE_URL": infra.new_database(),
        "EMAIL_HOST": "127.0.0.2",
        "EMAIL_PORT": "2525",
        "POSTROAD_ON_UNCERTAIN": "hold",
    }
    stack = new_servers(**given)
    stack.up("--infra-only")
    assert _running(stack) == {"dns"}
    env = stack.env()
    assert env.items() >= given.items()
    assert "EMAIL_TLS" not in env


def test_given_variables_hold_until_down(new_servers: NewStack, infra: Infra) -> None:
    given = {"POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap, "POSTROAD_DATABASE_URL": infra.new_database()}
    stack = new_servers(**given, POSTROAD_DNS_SERVERS="127.0.0.9:53")
    stack.up("--infra-only")
    assert _running(stack) == {"catcher"}
    elsewhere = Stack(stack.directory)
    elsewhere.stop("catcher")
    elsewhere.start("catcher")
    assert elsewhere.env()["POSTROAD_DNS_SERVERS"] == "127.0.0.9:53"
    elsewhere.command("down")
    again = Stack(stack.directory, given)
    again.up("--infra-only")
    assert _running(again) == {"dns", "catcher"}


def test_up_restarts_what_a_changed_setting_concerns(stack: Stack) -> None:
    pids = {f"{service}-1": stack.pid(f"{service}-1") for service in SERVICES}
    tokens = {"POSTROAD_API_TOKENS": "red:secret-of-red"}
    # Another test may have given the topics more partitions.
    given = {**tokens, "POSTROAD_PARTITIONS": _partitions(stack)}
    try:
        done = Stack(stack.directory, given).command("up")
        assert {name for name, pid in pids.items() if stack.pid(name) != pid} == {"api-1"}
        assert _environment(stack.pid("api-1"))["POSTROAD_API_TOKENS"] == "red:secret-of-red"
        assert "api-1: starting anew with POSTROAD_API_TOKENS" in done.stderr
        assert "secret-of-red" not in done.stderr
        with (
            grpc.insecure_channel(stack.env()["POSTROAD_API"]) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            TaskServiceStub(channel).List(ListRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        # After a failed `up` the stack keeps its old settings.
        pids, env = {name: stack.pid(name) for name in pids}, stack.env()
        refused = Stack(stack.directory, {**given, "POSTROAD_PARTITIONS": "2"}).command("up", check=False)
        assert refused.returncode == 1
        assert "partitions, wanted 2" in refused.stderr
        assert stack.env() == env
        # A second replica must not have other settings than the first one.
        for arguments in (("scale", "sender", "2"), ("start", "sender-1")):
            alone = Stack(stack.directory, {**given, "EMAIL_FROM": "b@good.test"})
            refused = alone.command(*arguments, check=False)
            assert refused.returncode == 1
            assert "EMAIL_FROM" in refused.stderr
        assert {name: stack.pid(name) for name in pids} == pids
    finally:
        # A setting that has the stack's own value is not given any more.
        Stack(stack.directory, dict.fromkeys(tokens, "")).up()
    assert "POSTROAD_API_TOKENS" not in stack.env()
    assert {name for name, pid in pids.items() if stack.pid(name) != pid} == {"api-1"}


def test_a_running_server_is_not_replaced(new_servers: NewStack, infra: Infra) -> None:
    given = {"POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap, "POSTROAD_DATABASE_URL": infra.new_database()}
    stack = new_servers(**given)
    stack.up("--infra-only")
    before = stack.env()
    other = Stack(stack.directory, {**given, "POSTROAD_DNS_SERVERS": "127.0.0.9:53"})
    refused = other.command("up", "--infra-only", check=False)
    assert refused.returncode == 1
    assert all(word in refused.stderr for word in ("dns", "POSTROAD_DNS_SERVERS", "make down"))
    assert stack.env() == before
    # The catcher requires the credentials that the sender uses.
    user = {"EMAIL_USER": "postroad", "EMAIL_PASS": "let-me-in"}
    pid = stack.pid("catcher")
    Stack(stack.directory, {**given, **user}).up("--infra-only")
    assert stack.pid("catcher") != pid
    assert _environment(stack.pid("catcher")).items() >= user.items()


def test_up_in_a_shell_with_stack_env_replaces_nothing(infra: Infra) -> None:
    before = infra.env(), {name: infra.pid(name) for name in ("dns", "mysql", "catcher", "kafka-1")}
    reader = Stack(infra.directory, infra.env())
    reader.up("--infra-only")
    assert (infra.env(), {name: infra.pid(name) for name in before[1]}) == before
    assert _running(infra) == {"dns", "mysql", "catcher", "kafka-1"}


def test_pid_files_that_are_wrong_or_missing_do_no_harm(
    new_servers: NewStack, infra: Infra, bystander: subprocess.Popen[bytes]
) -> None:
    stack = new_servers(POSTROAD_KAFKA_BOOTSTRAP=infra.bootstrap, POSTROAD_DATABASE_URL=infra.new_database())
    stack.up("--infra-only")
    stack.kill("dns")
    (stack.directory / "pids" / "dns.pid").write_text(f"{bystander.pid}\n")
    stack.stop("dns")
    stack.kill("dns")
    stack.start("dns")
    pid = stack.pid("dns")
    (stack.directory / "pids" / "dns.pid").unlink()
    stack.command("down")
    assert not _is_of(Path(f"/proc/{pid}"), stack.directory)
    assert bystander.poll() is None


def test_down_keeps_the_data_even_after_kills(new_servers: NewStack, infra: Infra) -> None:
    stack = new_servers(
        POSTROAD_KAFKA_BOOTSTRAP=infra.bootstrap,
        POSTROAD_DNS_SERVERS=infra.dns,
        EMAIL_HOST="127.0.0.2",
        EMAIL_PORT="2525",
    )
    stack.up("--infra-only")
    ports = stack.env()
    _query(stack, "CREATE TABLE kept (id INT PRIMARY KEY)")
    _query(stack, "INSERT INTO kept VALUES (7)")
    stack.kill("mysql")
    stack.command("down")
    assert not (stack.directory / "pids").exists()
    stack.up("--infra-only")
    assert _query(stack, "SELECT id FROM kept") == [(7,)]
    assert stack.env() == ports


def test_two_ups_at_once_start_one_stack(new_servers: NewStack, infra: Infra) -> None:
    stack = new_servers(POSTROAD_KAFKA_BOOTSTRAP=infra.bootstrap, POSTROAD_DATABASE_URL=infra.new_database())
    with ThreadPoolExecutor() as pool:
        list(pool.map(stack.up, ["--infra-only"] * 2))
    mine = [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and _is_of(entry, stack.directory)
    ]
    assert len(mine) == 2  # dns and catcher


def _is_of(entry: Path, directory: Path) -> bool:
    try:
        return f"POSTROAD_LOCAL_DIR={directory}".encode() in (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


@pytest.mark.skipif(not LONG, reason="starts three brokers: make test-long")
def test_three_kafka_nodes_lose_one_and_keep_what_was_acked(new_servers: NewStack) -> None:
    stack = new_servers(POSTROAD_DATABASE_URL="mysql+mysqlconnector://nobody@127.0.0.1:1/none")
    stack.up("--infra-only", "--kafka-nodes", "3")
    env = stack.env()
    assert env["POSTROAD_REPLICATION"] == "3"
    refused = stack.command("up", "--infra-only", "--kafka-nodes", "1", check=False)
    assert refused.returncode == 1
    assert "--wipe" in refused.stderr

    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "topics", "apply", "--yes"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    failures: list[object] = []
    producer = Producer({"bootstrap.servers": env["POSTROAD_KAFKA_BOOTSTRAP"], "acks": "all"})
    for number in range(300):
        producer.produce(
            "task.created",
            b"%d" % number,
            on_delivery=lambda error, _: failures.append(error) if error else None,
        )
        if number == 100:
            producer.flush(60)
            stack.kill("kafka-2")
    assert producer.flush(60) == 0
    assert failures == []
    stack.start("kafka-2")

    consumer = Consumer(
        {
            "bootstrap.servers": env["POSTROAD_KAFKA_BOOTSTRAP"],
            "group.id": "check",
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe(["task.created"])
    found: set[bytes | None] = set()
    while len(found) < 300:
        messages = consumer.consume(300 - len(found), 30.0)
        assert messages, f"only {len(found)} of 300 records are there"
        found |= {message.value() for message in messages if not message.error()}
    consumer.close()
