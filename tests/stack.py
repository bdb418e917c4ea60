"""Real servers for tests: `Infra` is Kafka, MySQL, DNS and the mail catcher, `Stack` is the whole system.

conftest.py registers these fixtures:

- `infra`: one set of servers for all workers of the run. Take `new_database()` and `topic_prefix()` from it,
  so that no test sees another's rows or records.
- `mariadb`: one MariaDB server for all workers of the run.
- `servers`: the same as `infra`, except for tests marked `breaks_servers`. These run one after another on
  servers that they may stop, freeze and misconfigure (`breakable`, and `breakable_mariadb`).
- `stack`: one whole system, with one replica of each service. Its tests run one after another.
- `hold_stack`: a second one, which holds mails in doubt. Its times are short.
- `new_stack`: makes further systems on the shared Kafka and MySQL. They have their own settings, mail server
  and name server, and end with the test.
- `new_servers`: makes stacks with all servers of their own, which end with the test.

`POSTROAD_TEST_SECURE=1` makes `stack` and `hold_stack` secure ones, each with servers of its own.

`POSTROAD_TEST_INFRA=DIRECTORY` makes `infra` use the servers under that directory, and leave them running.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import mysql.connector
import pytest
from sqlalchemy import make_url

from deploy.local.database_tree import find_server, make_template
from deploy.local.database_users import user_statements
from deploy.local.environment import service_environment
from deploy.local.security import authority
from deploy.local.state import StackState
from services.common.kafka.topics import Names
from services.common.migrations import VERSION_TABLE, migrate
from tests import forked
from tests.forms import by_form
from tests.reaper import RUN

__all__ = [
    "Infra",
    "Stack",
    "breakable",
    "breakable_mariadb",
    "end_shared_servers",
    "further",
    "hold_stack",
    "infra",
    "mariadb",
    "new_servers",
    "new_stack",
    "running",
    "servers",
    "shared",
    "stack",
]

# The end-to-end tests run on stacks with TLS and the least rights.
SECURE = bool(os.environ.get("POSTROAD_TEST_SECURE"))

ROOT = Path(__file__).resolve().parents[1]

S = TypeVar("S", bound="Stack")


class Stack:
    """The stack under `directory`, through `python3 -m deploy.local`. `given`: variables that win in it."""

    def __init__(
        self,
        directory: Path,
        given: Mapping[str, str] | None = None,
        *,
        lasting: bool = False,
        secure: bool = False,
    ) -> None:
        self.directory = directory
        self._secure = ("--secure",) if secure else ()
        self._given = dict(given or {})
        self._lasting = lasting

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one command of deploy.local; blocks until it is done. Raises AssertionError if it fails."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("POSTROAD_", "EMAIL_"))}
        # A broker of the tests ends before the JVM's second compiler pays off.
        clean["JDK_JAVA_OPTIONS"] = "-XX:TieredStopAtLevel=1"
        if self._lasting:
            # It has thousands of partitions in the end.
            clean["_JAVA_OPTIONS"] = "-Xmx1g"
        # The port of the documents' examples belongs to the stack whose tests run them.
        clean["POSTROAD_LOCAL_API_PORT"] = "0"
        environment = {**clean, **self._given, "POSTROAD_LOCAL_DIR": str(self.directory)}
        done = forked.run("deploy.local", arguments, environment)
        if check and done[0]:
            raise AssertionError(f"deploy.local {' '.join(arguments)}: {done[1]}{done[2]}")
        return subprocess.CompletedProcess(arguments, *done)

    def up(self, *options: str) -> None:
        """Start what does not run, with options such as `--sender`, `3`; returns when all is ready."""
        self.command("up", *self._secure, *options)

    def scale(self, service: str, count: int) -> None:
        """Run `count` replicas of a service."""
        self.command("scale", service, str(count))

    def start(self, *names: str) -> None:
        """Start processes at once; returns when they are ready."""
        self.command("start", *names)

    def stop(self, name: str) -> None:
        """End one process by SIGTERM; fails if it had to be killed."""
        self.command("stop", name)

    def kill(self, name: str) -> None:
        """End one process by SIGKILL."""
        self.command("kill", name)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Freeze one process (SIGSTOP) within the block."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def down(self) -> None:
        """End everything and delete the data."""
        self.command("down", "--wipe")
        shutil.rmtree(self.directory, ignore_errors=True)

    def env(self) -> dict[str, str]:
        """stack.env as it is now."""
        lines = (self.directory / "stack.env").read_text().splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    @property
    def environment(self) -> Mapping[str, str]:
        """The settings that point a further api at its Kafka, its database and its topics."""
        state = StackState.load(self.directory / "state.json")
        named = ("POSTROAD_KAFKA_", "POSTROAD_DATABASE_URL", "POSTROAD_TOPIC_PREFIX")
        settings = service_environment(state, "api-1") if state.secure else self.env()
        return {name: value for name, value in settings.items() if name.startswith(named)}

    @property
    def database(self) -> str:
        """The URL of its database, for a user who may do anything."""
        url = make_url(self.env()["POSTROAD_DATABASE_URL"])
        state = StackState.load(self.directory / "state.json")
        if state.secure:
            url = url.set(username="postroad", password=state.password)
        return url.render_as_string(hide_password=False)

    @property
    def kafka(self) -> dict[str, Any]:
        """librdkafka's settings of a client that may do anything."""
        config = {"bootstrap.servers": self.env()["POSTROAD_KAFKA_BOOTSTRAP"]}
        return config | self.principal("admin")

    @property
    def topics_user(self) -> dict[str, str]:
        """The settings with which `postroad topics` may change topics; none where everybody may."""
        principal = self.principal("topics")
        names = {"sasl.username": "USERNAME", "sasl.password": "PASSWORD"}
        return {
            f"POSTROAD_KAFKA_SASL_{names[name]}": value for name, value in principal.items() if name in names
        }

    @property
    def is_secure(self) -> bool:
        """Whether its Kafka and its MySQL take TLS alone."""
        return bool(StackState.load(self.directory / "state.json").secure)

    def principal(self, program: str) -> dict[str, str]:
        """Return librdkafka's settings of a program's principal; none where the stack is in clear."""
        if not self.is_secure:
            return {}
        state = StackState.load(self.directory / "state.json")
        return {
            "security.protocol": "sasl_ssl",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": f"postroad-{program}",
            "sasl.password": state.passwords[f"kafka-{program}"],
            "ssl.ca.location": str(authority(state)),
        }

    @property
    def names(self) -> Names:
        """The names of its topics and groups."""
        return Names(self.env().get("POSTROAD_TOPIC_PREFIX", ""))

    def pid(self, name: str) -> int:
        """The process id of `name`, from its pid file."""
        return int((self.directory / "pids" / f"{name}.pid").read_text())

    def log(self, name: str) -> str:
        """What `name` has written so far."""
        return (self.directory / "logs" / f"{name}.log").read_text(errors="replace")

    @property
    def mail(self) -> Path:
        """The catcher's directory: journal.jsonl, control.json, the messages."""
        return self.directory / "mail"

    def journal(self) -> list[dict[str, Any]]:
        """What the catcher has taken so far, oldest first."""
        text = (self.mail / "journal.jsonl").read_text()
        # Leave out a line that is still being written.
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def control_mail(self, **orders: object) -> None:
        """Write the catcher's control file (deploy.local.catcher.control says what it may hold)."""
        _write(self.mail / "control.json", orders)

    def control_dns(self, **names: str) -> None:
        """Make names misbehave: `control_dns(**{"good.test": "servfail"})`; restart the `flaky` counts."""
        (self.directory / "dns").mkdir(exist_ok=True)
        _write(self.directory / "dns" / "control.json", {"names": names})


class Infra(Stack):
    """Kafka, MySQL, DNS and the catcher, without services."""

    @property
    def bootstrap(self) -> str:
        """Kafka's address for clients."""
        return self.env()["POSTROAD_KAFKA_BOOTSTRAP"]

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL of the server's first database; its user may do anything."""
        return self.env()["POSTROAD_DATABASE_URL"]

    @property
    def dns(self) -> str:
        """The name server, host:port."""
        return self.env()["POSTROAD_DNS_SERVERS"]

    @property
    def smtp(self) -> tuple[str, int]:
        """The catcher's host and port."""
        env = self.env()
        return env["EMAIL_HOST"], int(env["EMAIL_PORT"])

    def new_database(self) -> str:
        """Create an empty database; returns its SQLAlchemy URL."""
        name = f"test_{secrets.token_hex(6)}"
        with self._cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        return make_url(self.database_url).set(database=name).render_as_string(hide_password=False)

    def migrated_database(self) -> str:
        """Create a database with this version's tables; returns its SQLAlchemy URL."""
        url = self.new_database()
        with self._cursor(make_url(url).database) as cursor:
            for statement in self._tables:
                cursor.execute(statement)
        return url

    def as_user(self, user: str, url: str) -> str:
        """Return a database's URL for a user of deploy/mysql/users.sql, such as `sender`.

        The user may do what that file grants, on the tables that the database has.
        """
        made = make_url(url)
        password = f"{user}-of-the-tests"
        with self._cursor() as cursor:
            cursor.execute("SELECT VERSION()")
            [(version,)] = cursor.fetchall()
            for statement in user_statements(made.database or "", {user: password}):
                # Debian's MariaDB has no certificate.
                cursor.execute(
                    statement.replace(" REQUIRE SSL", "" if "MariaDB" in version else " REQUIRE SSL")
                )
        return made.set(username=f"postroad_{user}", password=password).render_as_string(hide_password=False)

    @cached_property
    def _tables(self) -> list[str]:
        """The statements that create a migrated database's tables: much faster than another migration."""
        url = self.new_database()
        migrate(url)
        with self._cursor(make_url(url).database) as cursor:
            cursor.execute("SHOW TABLES")
            statements = []
            for (name,) in cursor.fetchall():
                cursor.execute(f"SHOW CREATE TABLE {name}")
                [(_, statement)] = cursor.fetchall()
                statements.append(statement)
            cursor.execute(f"SELECT version_num FROM {VERSION_TABLE}")
            [(version,)] = cursor.fetchall()
        return [*statements, f"INSERT INTO {VERSION_TABLE} VALUES ('{version}')"]

    @contextmanager
    def _cursor(self, database: str | None = None) -> Iterator[Any]:
        url = make_url(self.database_url)
        with (
            mysql.connector.connect(
                host=url.host,
                port=url.port,
                user=url.username,
                password=url.password,
                database=database or "",
                autocommit=True,
            ) as connection,
            connection.cursor() as cursor,
        ):
            yield cursor

    def topic_prefix(self) -> str:
        """A prefix for topic and group names that no other test has."""
        return f"t{secrets.token_hex(5)}."


def _write(path: Path, content: object) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content))
    partial.rename(path)


def _directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="postroad-"))


class _Shared(Infra):
    """Servers that other workers use as well: a test can neither stop them nor make them misbehave."""

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command that stops nothing."""
        assert arguments[0] not in {"stop", "kill", "down"}, f"{arguments[0]}: mark the test breaks_servers"
        return super().command(*arguments, check=check)

    def control_mail(self, **orders: object) -> None:
        """Fail, because the mail catcher has other users."""
        raise AssertionError("mark the test breaks_servers")

    def control_dns(self, **names: str) -> None:
        """Fail, because the name server has other users."""
        raise AssertionError("mark the test breaks_servers")


@pytest.fixture(scope="session")
def infra() -> Infra:
    """Kafka, MySQL, DNS and the catcher for all tests of this run, whichever worker they are on."""
    given = os.environ.get("POSTROAD_TEST_INFRA")
    directory = Path(given) if given else Path(os.environ[RUN]) / "infra"
    # Nobody kills this broker, and a busy machine may silence it for seconds.
    servers = _Shared(directory, {"POSTROAD_LOCAL_BROKER_SESSION": "60"}, lasting=True)
    # The first worker starts them; each further one waits for the stack's lock and finds them running.
    servers.up("--infra-only")
    return servers


def _mariadb(directory: Path, kind: type[Infra]) -> Infra:
    """A MariaDB server and nothing else, not up yet; skips the test where MariaDB is not installed."""
    server = find_server("mariadb")
    if server is None:
        pytest.skip("MariaDB is not installed (Debian: mariadb-server-core)")
    make_template(server)
    # The stack starts nothing that a variable gives.
    given = {"POSTROAD_KAFKA_BOOTSTRAP": "127.0.0.1:1", "POSTROAD_DNS_SERVERS": "127.0.0.1:1"}
    given |= {"EMAIL_HOST": "127.0.0.1", "EMAIL_PORT": "1", "POSTROAD_LOCAL_DB": "mariadb"}
    return kind(directory, given)


@pytest.fixture(scope="session")
def mariadb() -> Infra:
    """A MariaDB server for all tests of this run, and nothing else."""
    servers = _mariadb(Path(os.environ[RUN]) / "mariadb", _Shared)
    servers.up("--infra-only")
    return servers


def end_shared_servers() -> None:
    """End the servers that the workers of this run shared."""
    for name in ("infra", "mariadb"):
        if (directory := Path(os.environ[RUN]) / name).exists():
            Stack(directory).down()


@contextmanager
def running(system: S, *options: str) -> Iterator[S]:
    """Run a stack within the block; at its end, stop it and delete its data."""
    try:
        system.up(*options)
        yield system
    finally:
        system.down()


def further(infra: Infra, **given: str) -> Stack:
    """Return a further installation on the shared Kafka and MySQL, not up yet.

    A secure one has its own.
    """
    if SECURE:
        return Stack(_directory(), {"POSTROAD_PARTITIONS": "3", **given}, secure=True)
    return Stack(_directory(), {**shared(infra), **given})


@pytest.fixture(scope="session")
def breakable() -> Iterator[Infra]:
    """Servers of this worker alone, for its tests that are marked `breaks_servers`."""
    with running(Infra(_directory()), "--infra-only") as servers:
        yield servers


@pytest.fixture(scope="session")
def breakable_mariadb() -> Iterator[Infra]:
    """A MariaDB server of this worker alone, for its tests that are marked `breaks_servers`."""
    with running(_mariadb(_directory(), Infra), "--infra-only") as servers:
        yield servers


@pytest.fixture
def servers(request: pytest.FixtureRequest) -> Infra:
    """The shared servers, or those that a test marked `breaks_servers` may break."""
    breaks = request.node.get_closest_marker("breaks_servers")
    found: Infra = request.getfixturevalue("breakable" if breaks else "infra")
    return found


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The whole system, one replica of each service, for all tests that ask for it.

    It is up: test_grow.py gives its topics more partitions than `up` would accept.
    """
    with running(Stack(_directory(), {"POSTROAD_PARTITIONS": "3"}, secure=SECURE)) as system:
        # The stack itself remembers what `up` was given.
        yield Stack(system.directory)


@pytest.fixture(scope="session")
def hold_stack(infra: Infra) -> Iterator[Stack]:
    """A whole system that sends no mail in doubt again, for all tests that ask for it.

    It uses the shared Kafka and MySQL. Each of its tests leaves one replica of each service, a mail server
    without faults, and no task that works.
    """
    given = {
        "POSTROAD_ON_UNCERTAIN": "hold",
        "POSTROAD_LEASE_SECONDS": "3",
        # One domain gets 6 of these sessions.
        "POSTROAD_SENDER_SESSIONS": "8",
        "POSTROAD_MAX_IN_FLIGHT": "60",
        # The validator soon runs out of attempts, and the sender's second deferral lasts.
        "POSTROAD_VALIDATOR_DELAYS": "1",
        "POSTROAD_SENDER_DELAYS": "4,3600",
        # The long form uses the settings' own times.
        **by_form({"POSTROAD_REVOKE_SECONDS": "1", "POSTROAD_DRAIN_SECONDS": "1"}, {}),
    }
    with running(further(infra, **given)) as system:
        yield system


@pytest.fixture
def new_servers() -> Iterator[Callable[..., Stack]]:
    """`new_servers(POSTROAD_LOCAL_DB="mariadb")` is a stack with that variable, not up yet."""
    with ExitStack() as made:

        def make(**given: str) -> Stack:
            system = Stack(_directory(), given)
            made.callback(system.down)
            return system

        yield make


@pytest.fixture
def new_stack(infra: Infra, new_servers: Callable[..., Stack]) -> Callable[..., Stack]:
    """`new_stack(POSTROAD_ON_UNCERTAIN="hold")` is a system with that setting, not up yet."""
    return lambda **given: new_servers(**{**shared(infra), **given})


def shared(infra: Infra) -> dict[str, str]:
    """Return the variables of a further installation on the shared Kafka and MySQL."""
    return {
        "POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap,
        "POSTROAD_DATABASE_URL": infra.new_database(),
        "POSTROAD_TOPIC_PREFIX": infra.topic_prefix(),
        "POSTROAD_PARTITIONS": "3",
    }
