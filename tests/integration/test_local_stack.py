"""The local stack's servers: the contract that people and tests rely on."""

import os
import signal
from pathlib import Path

import mysql.connector
import pytest
from sqlalchemy import make_url

from deploy.local.layout import Layout
from deploy.local.stack import Stack as LocalStack
from tests.stack import Infra

SERVERS = ("catcher", "dns", "kafka-1", "mysql")


def _started_environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.partition("=")[::2] for pair in pairs)


def test_every_server_has_its_own_pid_and_its_stack_in_its_environment(infra: Infra) -> None:
    assert sorted(path.stem for path in (infra.directory / "pids").iterdir()) == sorted(SERVERS)
    programs = ("deploy.local.catcher", "deploy.local.dns", "kafka.Kafka", "mysqld")
    for name, program in zip(SERVERS, programs, strict=True):
        assert program in Path(f"/proc/{infra.pid(name)}/cmdline").read_text()
        assert _started_environment(infra.pid(name))["POSTROAD_LOCAL_DIR"] == str(infra.directory)
        assert (infra.directory / "logs" / f"{name}.log").exists()


def test_stack_env_has_the_settings_that_clients_need(infra: Infra) -> None:
    env = infra.env()
    needed = {
        "POSTROAD_API", "POSTROAD_KAFKA_BOOTSTRAP", "POSTROAD_DATABASE_URL", "POSTROAD_DNS_SERVERS",
        "EMAIL_HOST", "EMAIL_PORT", "EMAIL_USER", "EMAIL_PASS",
    }  # fmt: skip
    assert needed <= env.keys()
    assert (infra.directory / "stack.env").stat().st_mode & 0o077 == 0


def test_only_its_owner_reads_the_stack(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir(mode=0o755)
    (old / "state.json").write_text("{}")
    (tmp_path / "mine").mkdir(mode=0o755)
    for name, mode in (("new/one", 0o700), ("old", 0o700), ("mine", 0o755)):
        with LocalStack(Layout(tmp_path / name)).changing():
            assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_a_second_up_restarts_nothing(infra: Infra) -> None:
    before = {name: infra.pid(name) for name in SERVERS}
    infra.up("--infra-only")
    assert {name: infra.pid(name) for name in SERVERS} == before


def test_mysql_is_durable_and_reads_committed(infra: Infra) -> None:
    url = make_url(infra.new_database())
    with (
        mysql.connector.connect(
            host=url.host, port=url.port, user=url.username, password=url.password, database=url.database
        ) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(
            "SELECT @@innodb_flush_log_at_trx_commit, @@transaction_isolation, @@version, DATABASE()"
        )
        flush, isolation, version, database = cursor.fetchone()
    assert (flush, isolation, database) == (1, "READ-COMMITTED", url.database)
    assert version.startswith(("9.7", "8.4"))


@pytest.mark.breaks_servers
def test_killed_servers_restart_on_their_ports(servers: Infra) -> None:
    env = servers.env()
    pids = {name: servers.pid(name) for name in SERVERS}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    servers.start(*SERVERS)
    assert all(servers.pid(name) != pid for name, pid in pids.items())
    assert servers.env() == env
    status = servers.command("status").stdout
    assert status.count(" running ") == status.count(" yes ") == len(SERVERS)
