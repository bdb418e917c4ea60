"""The real stack with a proxy on every link. It starts, ends, freezes and supervises the processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mysql.connector

from deploy.local import process
from deploy.local.component import Component
from deploy.local.database import database_component
from deploy.local.database_tree import find_server, template_path
from deploy.local.environment import stack_environment
from deploy.local.files import write_whole
from deploy.local.kafka_node import kafka_component
from deploy.local.layout import ROOT, Layout
from deploy.local.ports import HOST
from deploy.local.services import catcher_component, dns_component, service_component
from deploy.local.state import SERVICES, StackState
from tests.chaos.history import History
from tests.chaos.proxy import Proxies

__all__ = ["System"]

# Short delays, since every task must settle within a minute of the last fault. Many DNS attempts and resends,
# since the faults hit some tasks again and again, and each must still end as its recipient says.
SETTINGS = {
    "POSTROAD_SENDER_DELAYS": "2,5,10",
    "POSTROAD_VALIDATOR_DELAYS": "1,2,4,8,15,30",
    "POSTROAD_MAX_RESENDS": "20",
}
_DISKS = {"mysql": "900m", "kafka-1": "700m"}
_READY = 180.0


class System:
    """Kafka, MySQL, the name server, the mail server and the services, under `directory`.

    With `disks`, MySQL and kafka-1 each have a small tmpfs of their own, which needs root. `mutant` is a
    module of tests.chaos.mutants that runs in place of the service that it breaks. All methods block and are
    thread-safe.
    """

    def __init__(
        self, directory: Path, history: History, *, disks: bool = False, mutant: str = "",
        replicas: dict[str, int] | None = None,
        kafka_nodes: int = 3,
    ) -> None:  # fmt: skip
        self.layout = Layout(directory)
        self._history, self._mutant = history, mutant
        self._state = StackState(
            kafka_nodes=kafka_nodes, replicas={**dict.fromkeys(SERVICES, 2), **(replicas or {})}
        )
        self._proxies = Proxies()
        self._disks = _DISKS if disks else {}
        self._mounted: list[Path] = []
        self._wanted: set[str] = set()
        self._pids: dict[str, int] = {}
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._advertised: dict[str, int] = {}
        state = self._state
        for name in state.kafka_names():
            self._advertised[name] = self._proxies.add(name, HOST, state.port(name, "client"))
        database = self._proxies.add("mysql", HOST, state.port("mysql", "sql"))
        smtp = self._proxies.add("smtp", HOST, state.port("catcher", "smtp"))
        self.targets = [
            f"{HOST}:{self._proxies.add('clients', HOST, state.port(f'api-{number}', 'grpc'))}"
            for number in (1, 2)
        ]
        own = stack_environment(state)["POSTROAD_DATABASE_URL"]
        state.given = {
            **SETTINGS,
            "POSTROAD_KAFKA_BOOTSTRAP": ",".join(f"{HOST}:{port}" for port in self._advertised.values()),
            "POSTROAD_DATABASE_URL": own.replace(f":{state.port('mysql', 'sql')}/", f":{database}/"),
            "EMAIL_HOST": HOST,
            "EMAIL_PORT": str(smtp),
            "EMAIL_TLS": "none",
        }

    # What the system consists of

    @property
    def bootstrap(self) -> str:
        """Kafka's addresses for clients, through the proxies."""
        return self._state.given["POSTROAD_KAFKA_BOOTSTRAP"]

    @property
    def direct(self) -> str:
        """The address of the first api replica, without a proxy."""
        return f"{HOST}:{self._state.port('api-1', 'grpc')}"

    def replicas(self, service: str) -> list[str]:
        """Return the names of the replicas that a service should have."""
        return self._state.replica_names(service)

    def journal(self) -> list[dict[str, object]]:
        """Return the mails that the mail server took, oldest first."""
        text = (self.layout.mail / "journal.jsonl").read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def _component(self, name: str) -> Component:
        if name.startswith("kafka-"):
            return kafka_component(self.layout, self._state, name)
        if name == "mysql":
            return database_component(self.layout, self._state)
        if name == "dns":
            return dns_component(self.layout, self._state)
        if name == "catcher":
            return catcher_component(self.layout, self._state)
        return service_component(self.layout, self._state, name)

    # Up and down

    def up(self) -> None:
        """Start everything. Returns when all is ready; raises RuntimeError when it does not get ready."""
        for name, size in self._disks.items():
            self._mount(name, size)
        servers = [*self._state.kafka_names(), "mysql", "dns", "catcher"]
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.start, servers))
            list(pool.map(self.wait_ready, servers))
        for command in ("migrate", "topics apply --yes"):
            self._postroad(command)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        services = self._state.service_names()
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.start, services))
            list(pool.map(self.wait_ready, services))

    def down(self, *, keep: bool = False) -> None:
        """End everything. Delete the data but not the logs; `keep` leaves the data on real disks."""
        self._closing.set()
        with self._lock:
            self._wanted.clear()
        for name in process.find_all(self.layout):
            process.end(self.layout, name, 0)
        self._proxies.close()
        for mounted in self._mounted:
            subprocess.run(["umount", "-l", mounted], check=False)
        if not keep:
            shutil.rmtree(self.layout.root / "data", ignore_errors=True)

    def inside(self, ids: Iterable[str]) -> dict[str, Any]:
        """Return the rows of these tasks and the services' metrics, for the search for a cause."""
        hexes = [id_.replace("-", "") for id_ in ids]
        found: dict[str, Any] = {}
        with self._connect() as connection, connection.cursor(dictionary=True) as cursor:
            for table, key in (("tasks", "id"), ("outbox", "task_id"), ("deliveries", "task_id")):
                placeholders = ",".join(["UNHEX(%s)"] * len(hexes))
                cursor.execute(f"SELECT * FROM {table} WHERE {key} IN ({placeholders})", hexes)
                found[table] = [{k: _plain(v) for k, v in row.items()} for row in cursor.fetchall()]
            cursor.execute("SELECT COUNT(*) AS n, MIN(available_at) AS due FROM outbox")
            found["outbox_all"] = {k: _plain(v) for k, v in cursor.fetchone().items()}
        for name in self._state.service_names():
            url = f"http://{HOST}:{self._state.port(name, 'http')}/metrics"
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
                lines = answer.read().decode().splitlines()
                found[name] = [
                    line for line in lines if line.startswith("postroad") and "_bucket" not in line
                ]
        return found

    def _connect(self) -> Any:
        return mysql.connector.connect(
            host=HOST, port=self._state.port("mysql", "sql"), user="postroad", password=self._state.password,
            database="postroad", connection_timeout=2,
        )  # fmt: skip

    def _postroad(self, command: str) -> None:
        env = {**_clean(), **stack_environment(self._state)}
        argv = [sys.executable, "-m", "services.cli", *command.split()]
        done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"postroad {command}: {done.stdout}{done.stderr}")

    def _mount(self, name: str, size: str) -> None:
        data = self.layout.data(name)
        data.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "postroad", data], check=True)
        self._mounted.append(data)
        if name == "mysql":
            server = find_server(self._state.database)
            assert server is not None, "MySQL is not installed: run `make setup`"
            shutil.copytree(template_path(server) / "data", data, dirs_exist_ok=True, symlinks=True)

    # Processes

    def start(self, name: str) -> None:
        """Start a process unless it runs. Does not wait until it is ready."""
        with self._lock:
            self._wanted.add(name)
            if process.find(self.layout, name) is not None:
                return
            component = self._component(name)
            component.prepare()
            if name in self._advertised:
                self._advertise(name)
            argv = component.argv
            if self._mutant and argv[-1] == f"services.{_service_of(self._mutant)}":
                argv = (*argv[:-1], f"tests.chaos.mutants.{self._mutant}")
            env = {**_clean(), "PYTHONUNBUFFERED": "1", **component.env}
            self._pids[name] = process.spawn(self.layout, name, argv, env, cwd=ROOT)

    def wait_ready(self, name: str, seconds: float = _READY) -> None:
        """Wait until a process is ready, or should not run any more. Raises RuntimeError after `seconds`."""
        component = self._component(name)
        end = time.monotonic() + seconds
        while not component.is_ready() and name in self._wanted:
            if time.monotonic() > end:
                raise RuntimeError(f"{name} is not ready:\n{process.log_tail(self.layout, name)}")
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """Send SIGKILL. Returns when the process is gone."""
        self._end(name, 0)

    def stop(self, name: str) -> bool:
        """Send SIGTERM. Return whether the process exited in time with 0."""
        return self._end(name, self._component(name).grace)

    def _end(self, name: str, grace: float) -> bool:
        with self._lock:
            self._wanted.discard(name)
        ended = process.end(self.layout, name, grace)
        # After an orderly end, Java still exits with the number of the signal.
        return ended and self._reap(name) in (0, None, 128 + signal.SIGTERM)

    def freeze(self, name: str) -> None:
        """Send SIGSTOP."""
        if pid := process.find(self.layout, name):
            os.kill(pid, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Send SIGCONT."""
        if pid := process.find(self.layout, name):
            os.kill(pid, signal.SIGCONT)

    def runs(self, name: str) -> bool:
        """Return whether the process runs."""
        return process.find(self.layout, name) is not None

    def scale(self, service: str, count: int) -> None:
        """Start or drain replicas of a service until it has `count`."""
        with self._lock:
            before = self.replicas(service)
            self._state.replicas[service] = count
            after = self.replicas(service)
        for name in after:
            if name not in before:
                self.start(name)
        for name in before:
            if name not in after:
                self.stop(name)

    def _advertise(self, name: str) -> None:
        """Make clients and the other brokers connect through the proxy."""
        path = self.layout.root / "data" / f"{name}.properties"
        lines = [
            f"advertised.listeners=PLAINTEXT://{HOST}:{self._advertised[name]}"
            if line.startswith("advertised.listeners=")
            else line
            for line in path.read_text().splitlines()
        ]
        write_whole(path, "\n".join(lines) + "\n")

    def _reap(self, name: str) -> int | None:
        """Return the exit code of a process that ended (negative: the signal), or None when it is unknown."""
        pid = self._pids.get(name)
        if pid is None:
            return None
        with contextlib.suppress(ChildProcessError):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self._pids[name]
                return os.waitstatus_to_exitcode(status)
        return None

    def _watch(self) -> None:
        """Restart the processes that end by themselves, as a supervisor does."""
        while not self._closing.wait(0.5):
            for name in sorted(self._wanted):
                if process.find(self.layout, name) is not None:
                    continue
                with self._lock:
                    there = process.find(self.layout, name) is not None
                    if there or name not in self._wanted or self._closing.is_set():
                        continue
                    code = self._reap(name)
                    crash = code is not None and code < 0 and name.rpartition("-")[0] in SERVICES
                    self._history.write("exit", name=name, code=code, crash=crash)
                    time.sleep(1)
                    with contextlib.suppress(Exception):
                        self.start(name)

    # Faults

    def link(self, name: str, mode: str) -> None:
        """Set the proxy mode of a link: mysql, smtp, clients or a broker's name."""
        self._proxies.set(name, mode)  # type: ignore[arg-type]

    def control_mail(self, **orders: object) -> None:
        """Write the mail server's control file (deploy.local.catcher.control)."""
        write_whole(self.layout.mail / "control.json", json.dumps(orders))

    def control_dns(self, **names: str) -> None:
        """Write the name server's control file; the name `*` stands for all."""
        write_whole(self.layout.dns / "control.json", json.dumps({"names": names}))

    def fill(self, name: str) -> None:
        """Fill the disk of MySQL or kafka-1."""
        path = self.layout.data(name) / "ballast"
        with path.open("wb") as file:
            step = 1 << 24
            size = 0
            while step >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), size, step)
                    size += step
                except OSError:
                    step //= 2

    def empty(self, name: str) -> None:
        """Free the disk again."""
        (self.layout.data(name) / "ballast").unlink(missing_ok=True)

    def mysql_back(self, seconds: float = 120) -> float:
        """Wait until MySQL accepts a login. Return the monotonic time of that; raises RuntimeError."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(mysql.connector.Error):
                self._connect().close()
                return time.monotonic()
            time.sleep(0.02)
        raise RuntimeError("MySQL did not come back")


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes | bytearray) else value if value is None else str(value)


def _clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("POSTROAD_", "EMAIL_"))}


def _service_of(mutant: str) -> str:
    return mutant.partition("_")[0]
