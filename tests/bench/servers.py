"""The servers of a run, and the installations that are measured on them.

`Servers` is a Kafka, a database, a name server and a mail catcher. They stay up for the whole run, so that
the broker's compiler warms up once. An `Installation` is the services of one clone, with a database and
topics of their own. Only one runs at a time, since an idle one would cost the servers CPU.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mysql.connector
from confluent_kafka.admin import AdminClient
from sqlalchemy import make_url

from deploy.local.layout import ROOT
from deploy.local.state import StackState
from services.common.kafka.topics import Names
from tests.bench.receivers import Receiver
from tests.bench.usage import Usage, usage

__all__ = ["Installation", "Servers", "command", "read_env", "running_servers"]


def command(clone: Path, directory: Path, given: Mapping[str, str], *arguments: str) -> None:
    """Run a command of the clone's `deploy.local` on the stack under `directory`.

    `given` are variables for it. Blocks until it is done. Raises RuntimeError with what it wrote.
    """
    own = clone / ".venv/bin/python"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("POSTROAD_", "EMAIL_"))},
        "PYTHONPATH": f"{clone}{os.pathsep}{clone / 'protos'}",
        # The port of the documents' examples stays free.
        "POSTROAD_LOCAL_API_PORT": "0",
        **given,
        "POSTROAD_LOCAL_DIR": str(directory),
    }
    argv = [own if own.exists() else sys.executable, "-m", "deploy.local", *arguments]
    done = subprocess.run(argv, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"deploy.local {' '.join(arguments)}: {done.stdout}{done.stderr}")


def read_env(directory: Path) -> dict[str, str]:
    """Return the content of a stack's stack.env."""
    lines = (directory / "stack.env").read_text().splitlines()
    return dict(line.partition("=")[::2] for line in lines)


class Servers:
    """The servers under `directory`. `database` is `mysql` or `mariadb`."""

    def __init__(self, directory: Path, database: str, given: Mapping[str, str]) -> None:
        self.directory, self.database, self._given = directory, database, dict(given)

    def up(self) -> None:
        """Start them; blocks until they are ready."""
        # Nobody kills this broker, and a busy machine may silence it for seconds.
        session = {"POSTROAD_LOCAL_BROKER_SESSION": "60"}
        given = {"POSTROAD_LOCAL_DB": self.database, **session, **self._given}
        command(ROOT, self.directory, given, "up", "--infra-only")

    def down(self) -> None:
        """End them and delete their data."""
        command(ROOT, self.directory, {}, "down", "--wipe")
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def bootstrap(self) -> str:
        """Kafka's address."""
        return read_env(self.directory)["POSTROAD_KAFKA_BOOTSTRAP"]

    @property
    def journal(self) -> Path:
        """The catcher's journal."""
        return self.directory / "mail" / "journal.jsonl"

    def database_url(self, name: str) -> str:
        """Return the SQLAlchemy URL of a database of this name."""
        url = make_url(read_env(self.directory)["POSTROAD_DATABASE_URL"])
        return url.set(database=name).render_as_string(hide_password=False)

    def connection(self, name: str = "") -> Any:
        """Return a new autocommit connection to the database of this name."""
        url = make_url(self.database_url("postroad"))
        return mysql.connector.connect(
            host=url.host, port=url.port, user=url.username, password=url.password, database=name,
            autocommit=True, charset="utf8mb4", collation="utf8mb4_general_ci",
        )  # fmt: skip

    def usage(self) -> dict[str, Usage]:
        """Return what each server has used."""
        return usage(self.directory / "pids")


@contextmanager
def running_servers(database: str, **given: str) -> Iterator[Servers]:
    """Run servers within the block, with these variables; `database` is `mysql` or `mariadb`."""
    servers = Servers(Path(tempfile.mkdtemp(prefix="postroad-bench-")), database, given)
    try:
        servers.up()
        yield servers
    finally:
        servers.down()


class Installation:
    """The services of the clone at `clone` on `servers`, with new tables and topics.

    `receiver` takes the mail. `created` is how many tasks were created on it so far.
    """

    def __init__(self, servers: Servers, receiver: Receiver, clone: Path = ROOT, **given: str) -> None:
        self.servers, self.receiver, self._clone = servers, receiver, clone
        self.name = f"bench_{secrets.token_hex(4)}"
        self.directory = Path(tempfile.mkdtemp(prefix="postroad-bench-"))
        host, port = receiver.address
        self._given = {
            "POSTROAD_KAFKA_BOOTSTRAP": servers.bootstrap,
            "POSTROAD_DATABASE_URL": servers.database_url(self.name),
            "POSTROAD_TOPIC_PREFIX": f"{self.name}.",
            "POSTROAD_DNS_SERVERS": read_env(servers.directory)["POSTROAD_DNS_SERVERS"],
            "EMAIL_HOST": host,
            "EMAIL_PORT": str(port),
            **given,
        }
        self._mails_before = receiver.mails()
        self.created = 0
        self.sql: Any = None

    def __enter__(self) -> Installation:
        with self.servers.connection() as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {self.name} CHARACTER SET utf8mb4")
        self.sql = self.servers.connection(self.name)
        return self

    def __exit__(self, *_: object) -> None:
        command(self._clone, self.directory, {}, "down", "--wipe")
        shutil.rmtree(self.directory, ignore_errors=True)
        self.query(f"DROP DATABASE {self.name}")
        self.sql.close()
        admin = AdminClient({"bootstrap.servers": self.servers.bootstrap})
        ours = [name for name in admin.list_topics(timeout=15).topics if name.startswith(f"{self.name}.")]
        for done in admin.delete_topics(ours).values() if ours else ():
            done.result()

    def up(self, **replicas: int) -> None:
        """Start the services, each with one replica or as `replicas` says; returns when all are ready."""
        options = [part for service, n in replicas.items() for part in (f"--{service}", str(n))]
        command(self._clone, self.directory, self._given, "up", *options)

    def scale(self, service: str, count: int) -> None:
        """Run `count` replicas of a service; blocks until they are ready, and the others are drained."""
        command(self._clone, self.directory, {}, "scale", service, str(count))

    @property
    def names(self) -> Names:
        """The names of its topics and groups."""
        return Names(f"{self.name}.")

    @property
    def targets(self) -> list[str]:
        """The gRPC addresses of its apis."""
        state = StackState.load(self.directory / "state.json")
        return [f"127.0.0.1:{state.port(name, 'grpc')}" for name in state.replica_names("api")]

    def http(self, service: str) -> list[str]:
        """Return the HTTP addresses of a service's replicas."""
        start = f"POSTROAD_HTTP_{service.upper()}_"
        return [address for name, address in read_env(self.directory).items() if name.startswith(start)]

    def pid(self, name: str) -> int:
        """Return the process id of a replica, such as `sender-1`, or of a server."""
        for directory in (self.directory, self.servers.directory):
            if (file := directory / "pids" / f"{name}.pid").exists():
                return int(file.read_text())
        raise ValueError(f"no process {name} runs")

    def mails(self) -> int:
        """Return how many mails the receiver took since this installation was made."""
        return self.receiver.mails() - self._mails_before

    def usage(self) -> dict[str, Usage]:
        """Return what each process of it, of the servers and of the receiver has used."""
        return self.servers.usage() | usage(self.directory / "pids") | self.receiver.usage()

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Return the rows that a statement finds in its database."""
        with self.sql.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.with_rows else []

    def number(self, statement: str) -> int:
        """Return the one number that a statement finds."""
        [(number,)] = self.query(statement)
        return int(number)
