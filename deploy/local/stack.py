"""The stack as a whole: up, scale, start, stop, kill, down."""

import fcntl
import math
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from deploy.local import process, security
from deploy.local.component import Component
from deploy.local.database import database_component
from deploy.local.database_tree import chosen_kind
from deploy.local.database_users import USERS
from deploy.local.environment import (
    REPLACED_BY,
    given_variables,
    is_replaced,
    merge_given,
    refuse_private,
    services_reading,
    stack_environment,
)
from deploy.local.files import write_whole
from deploy.local.kafka_node import kafka_component
from deploy.local.launcher import Launcher, StackError
from deploy.local.layout import Layout
from deploy.local.ports import HOST, is_free
from deploy.local.services import catcher_component, dns_component, service_component
from deploy.local.state import DEFAULT_REPLICAS, SERVICES, StackState

__all__ = ["ProcessStatus", "Stack", "StackError"]


API_PORT = 50051
"""The port of the README's examples. The first api listens there when it is free."""

TOKENS = "POSTROAD_API_TOKENS"

# `down --wipe` deletes the data, so it waits for no longer drain.
_WIPE_SECONDS = 30


def _api_port() -> int:
    port = os.environ.get("POSTROAD_LOCAL_API_PORT") or str(API_PORT)
    if not (port.isdecimal() and int(port) < 65_536):
        raise StackError(f"POSTROAD_LOCAL_API_PORT is {port!r}; write a port, or 0 for any")
    return int(port)


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """What `status` shows of one process. `memory` is in bytes."""

    name: str
    pid: int | None
    ready: bool
    address: str
    memory: int


class Stack:
    """The stack under one directory. Its methods block until they are done, and raise StackError."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.state = StackState.load(layout.state)
        self._launcher = Launcher(layout, self.component)

    # What the stack consists of

    def infrastructure(self) -> list[str]:
        """Return the names of the servers that this stack runs; the user may have others elsewhere."""
        names = [] if is_replaced(self.state, "kafka") else self.state.kafka_names()
        return names + [name for name in ("mysql", "dns", "catcher") if not is_replaced(self.state, name)]

    def services(self) -> list[str]:
        """Return the names of all replicas that should run."""
        names = self.state.service_names()
        return [n for n in names if not (n.startswith("api-") and is_replaced(self.state, "api"))]

    def component(self, name: str) -> Component:
        """Return how to run `name`. Raises StackError when the stack has no such process."""
        if name not in self.infrastructure() + self.services():
            there = ", ".join(self.infrastructure() + self.services())
            raise StackError(f"no {name} in this stack; there are {there}")
        if name.startswith("kafka-"):
            return kafka_component(self.layout, self.state, name)
        if name == "mysql":
            return database_component(self.layout, self.state)
        if name == "dns":
            return dns_component(self.layout, self.state)
        if name == "catcher":
            return catcher_component(self.layout, self.state)
        return service_component(self.layout, self.state, name)

    def partitions(self) -> int:
        """Return how many partitions the settings of the stack give each topic."""
        # The import is slow, and few commands need it.
        from services.common.config import Settings  # noqa: PLC0415

        return int(self.state.given.get("POSTROAD_PARTITIONS") or Settings.model_fields["partitions"].default)

    def api_elsewhere(self) -> str:
        """Return a line that says where the first api is when another program has its port; else nothing."""
        wanted, port = _api_port(), self.state.port("api-1", "grpc")
        if "api-1" not in self.services() or wanted in (0, port) or is_free(wanted):
            return ""
        return f"{wanted} is taken; api-1 is at {HOST}:{port}"

    def processes(self) -> list[ProcessStatus]:
        """Return the present state of every process of the stack."""

        def process_status(name: str) -> ProcessStatus:
            component = self.component(name)
            pid = process.find(self.layout, name)
            memory = process.resident_bytes(pid) if pid else 0
            return ProcessStatus(
                name, pid, pid is not None and component.is_ready(), component.address, memory
            )

        names = self.infrastructure() + self.services()
        with ThreadPoolExecutor(max(1, len(names))) as pool:
            return list(pool.map(process_status, names))

    # Commands

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the stack's lock. The block works on the newest state, which is saved when it ends."""
        self._make_root()
        with self.layout.lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.state = StackState.load(self.layout.state)
            yield
            self._save()

    def _make_root(self) -> None:
        # Its logs, mails and data are its owner's alone. A directory of the user's that holds no stack stays
        # as it is until one is in it.
        root = self.layout.root
        if self.layout.state.exists() or not root.exists():
            root.mkdir(parents=True, exist_ok=True)
            root.chmod(0o700)

    def _save(self) -> None:
        # All ports are chosen here, under the lock, since the threads that start processes need the same
        # ones.
        self.state.choose_ports()
        text = "".join(f"{name}={value}\n" for name, value in sorted(stack_environment(self.state).items()))
        self.state.save(self.layout.state)
        write_whole(self.layout.env, text)

    def up(
        self,
        replicas: Mapping[str, int],
        kafka_nodes: int | None,
        *,
        services: bool = True,
        secure: bool = False,
    ) -> None:
        """Start what does not run, and restart what a changed setting concerns. Returns when all is ready.

        `services=False` starts the servers only. `secure` makes a new stack a secure one. On failure the
        stack keeps the settings that it had before.
        """
        with self.changing():
            before = dict(self.state.given)
            try:
                self._plan(replicas, kafka_nodes, services=services)
                self._secure(secure)
                self._save()
                self._bring_up(services=services, changed=self.state.given != before)
            except BaseException:
                self.state.given = before
                self._save()
                raise
        if before.get(TOKENS) and not self.state.given.get(TOKENS):
            print("the api needs no token now", file=sys.stderr, flush=True)

    def _bring_up(self, *, services: bool, changed: bool) -> None:
        """Start the planned processes. `changed`: the given settings differ from those before."""
        wanted = self.services() if services else []
        running = process.find_all(self.layout)
        stale = {name: settings for name in running if (settings := self._changed(name, running[name]))}
        missing = [name for name in wanted if name not in running or name in stale]
        with ThreadPoolExecutor() as pool:
            starts = {name: pool.submit(self._launcher.start, name) for name in self.infrastructure()}
            if (wanted and (missing or changed)) or self.state.secure:
                starts["preparation"] = pool.submit(self._prepare, dict(starts))
            self._launcher.results(starts.values())
        for name, settings in stale.items():
            print(f"{name}: starting anew with {', '.join(settings)}", file=sys.stderr, flush=True)
        self._launcher.end_all(stale)
        self._launcher.start_all(name for name in stale if name not in wanted)
        self._launcher.start_all(wanted)
        for service in SERVICES:
            self._end_surplus(service)

    def _prepare(self, starts: Mapping[str, Future[None]]) -> None:
        """Make the tables and the topics, each once the servers for them are ready."""
        variables = stack_environment(self.state)
        self._launcher.results([start for name, start in starts.items() if name == "mysql"])
        # The import takes a second. It also initialises MySQL's C library, which the wait for MySQL uses: two
        # threads must not do that at once.
        from deploy.local import access, preparation  # noqa: PLC0415

        secure = self.state.secure
        migrates, makes_topics = variables, variables
        if secure:
            access.grant_in_database(self.state, ["migrate"])
            migrates = variables | {"POSTROAD_DATABASE_URL": security.database_url(self.state, "migrate")}
            makes_topics = variables | security.kafka_settings(self.state, "topics")
            makes_topics["POSTROAD_KAFKA_SASL_PASSWORD"] = self.state.passwords["kafka-topics"]
        preparation.migrate(migrates)
        if secure:
            access.grant_in_database(self.state, [user for user in USERS if user != "migrate"])
        self._launcher.results([start for name, start in starts.items() if name.startswith("kafka-")])
        if secure:
            access.grant_in_kafka(self.state, variables.get("POSTROAD_TOPIC_PREFIX", ""))
        preparation.apply_topics(makes_topics)

    def _plan(self, replicas: Mapping[str, int], kafka_nodes: int | None, *, services: bool) -> None:
        refuse_private(os.environ)
        state, running, api_port = self.state, process.find_all(self.layout), _api_port()
        state.drop_busy_ports(running)
        if not running:
            state.prefer_api_port(api_port)
        if kafka_nodes and kafka_nodes != state.kafka_nodes:
            if self.layout.data("kafka-1").exists():
                raise StackError(
                    f"this stack has {state.kafka_nodes} Kafka node(s) and their data: `down --wipe` first"
                )
            state.kafka_nodes = kafka_nodes
        if "POSTROAD_LOCAL_DB" in os.environ and "mysql" not in running:
            state.database = chosen_kind()
        given = merge_given(state, os.environ)
        self._refuse_replacements(given, running)
        state.given = given
        if services:
            state.replicas = {
                service: state.replicas.get(service) or DEFAULT_REPLICAS[service] for service in SERVICES
            }
            state.replicas |= replicas

    def _secure(self, wanted: bool) -> None:
        """Make a new stack secure where that is `wanted`; a secure stack stays so. Raises StackError."""
        state = self.state
        if wanted and not state.secure:
            if (self.layout.root / "data").exists():
                raise StackError("this stack has data and is in clear: `down --wipe` first")
            state.secure = str(self.layout.root / "secure")
        if state.secure:
            # A later version may have further programs.
            state.passwords = security.make_passwords() | state.passwords
            if replaced := [server for server in ("kafka", "mysql") if is_replaced(state, server)]:
                raise StackError(
                    f"a secure stack has a server of its own, and {replaced[0]} is given elsewhere"
                )
            security.make_certificates(state)

    def _refuse_replacements(self, given: Mapping[str, str], running: Collection[str]) -> None:
        """Raise StackError when a variable names another server in place of one that runs."""
        for server, variables in REPLACED_BY.items():
            names = [name for name in running if name == server or name.startswith(f"{server}-")]
            now = [variable for variable in variables if given.get(variable)]
            if names and now and not is_replaced(self.state, server):
                raise StackError(f"{names[0]} runs, and {now[0]} is given in its place: `make down` first")

    def _changed(self, name: str, pid: int) -> list[str]:
        """Return the settings that concern a running process and had other values when it started."""
        try:
            wanted = self.component(name).env
        except StackError:  # it is not part of the stack any more
            return []
        has = process.environment(pid)
        service = name.rpartition("-")[0]
        names = {*wanted, *(variable for variable in has if variable.startswith(("POSTROAD_", "EMAIL_")))}
        if service in SERVICES:
            names = {variable for variable in names if service in services_reading(variable)}
        else:
            names = set(wanted)
        return sorted(
            variable
            for variable in names
            if not variable.startswith(("POSTROAD_HTTP_", "POSTROAD_LOCAL_"))
            and has.get(variable) != wanted.get(variable)
        )

    def _refuse_settings(self) -> None:
        """Raise StackError when the environment gives another setting than the stack has."""
        given = given_variables(self.state, os.environ)
        other = sorted(name for name, value in given.items() if self.state.given.get(name) != value)
        if other:
            raise StackError(f"{other[0]} is set here, and not in the stack: `up` gives it to all processes")

    def scale(self, service: str, count: int) -> None:
        """Start or drain replicas of a service until it has `count`; the highest numbers are drained."""
        with self.changing():
            self._refuse_settings()
            self.state.replicas[service] = count
            self._save()
            self._launcher.start_all([name for name in self.services() if name.startswith(f"{service}-")])
            self._end_surplus(service)

    def start(self, *names: str) -> None:
        """Start all of these at once, unless they run. Returns when they are ready."""
        with self.changing():
            self._refuse_settings()
            for name in names:
                self.component(name)
            self._save()
            self._launcher.start_all(names)

    def stop(self, name: str, *, kill: bool = False) -> bool:
        """End `name` by SIGTERM, or by SIGKILL with `kill`. Return whether it ended by itself in time."""
        with self.changing():
            grace = self.component(name).grace
            return process.end(self.layout, name, 0 if kill else grace)

    def down(self, *, wipe: bool = False) -> None:
        """End all processes, services first. Keep the data unless `wipe`, which waits less for drains."""
        with self.changing():
            while running := process.find_all(self.layout):
                for name, pid in running.items():
                    write_whole(self.layout.pid(name), f"{pid}\n", 0o644)
                names = set(running)
                servers = {name for name in names if name.rpartition("-")[0] not in SERVICES}
                self._launcher.end_all((names - servers) or servers, _WIPE_SECONDS if wipe else math.inf)
            shutil.rmtree(self.layout.root / "pids", ignore_errors=True)
            self.state.given = {}
            self.state.release_ports()
            if wipe:
                for directory in ("data", "logs", "mail", "dns", "secure"):
                    shutil.rmtree(self.layout.root / directory, ignore_errors=True)
                self.state = StackState()
        if wipe:
            self.layout.state.unlink()
            self.layout.env.unlink()

    def _end_surplus(self, service: str) -> None:
        keep = set(self.state.replica_names(service))
        # A killed replica does not run, but still has its pid file.
        there = {*process.find_all(self.layout), *self.layout.names_in("pids", ".pid")}
        self._launcher.end_all(n for n in there if n.rpartition("-")[0] == service and n not in keep)
