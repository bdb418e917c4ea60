"""What a stack remembers between commands: ports, replicas, and the variables that `up` was given."""

import json
import secrets
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deploy.local.files import write_whole
from deploy.local.ports import claim, free_port, is_free, release
from services.common.stages import STAGES

__all__ = ["DEFAULT_REPLICAS", "SERVICES", "StackState"]

SERVICES = ("api", *STAGES)
DEFAULT_REPLICAS = {"api": 1, **{name: stage.replicas for name, stage in STAGES.items()}}


@dataclass(slots=True)
class StackState:
    """The plan of a stack. `ports` is by process name and use; `given` comes from the environment of `up`.

    `secure` is the directory of a secure stack's certificates, empty for a stack in clear, and `passwords`
    are those of its programs.
    """

    ports: dict[str, dict[str, int]] = field(default_factory=dict)
    replicas: dict[str, int] = field(default_factory=dict)
    kafka_nodes: int = 1
    database: str = "mysql"
    password: str = field(default_factory=lambda: secrets.token_hex(12), repr=False)
    given: dict[str, str] = field(default_factory=dict, repr=False)
    secure: str = ""
    passwords: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: Path) -> "StackState":
        """Return the state in `path`, or a new one. Raises ValueError for a file that holds no state."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return cls()
        except TypeError as error:
            raise ValueError(f"{path} is of another version of this stack: {error}") from error

    def save(self, path: Path) -> None:
        """Write the state to `path` in one step."""
        values = asdict(self)
        if not self.secure:
            # A version before secure stacks reads the state of one in clear.
            del values["secure"], values["passwords"]
        write_whole(path, json.dumps(values, indent=1) + "\n")

    def port(self, name: str, use: str) -> int:
        """Return the port of process `name` for `use`: a free one at first, later the same one."""
        mine = self.ports.setdefault(name, {})
        if use not in mine:
            mine[use] = free_port({port for ports in self.ports.values() for port in ports.values()})
        return mine[use]

    def choose_ports(self) -> None:
        """Choose every port that this plan needs and does not have yet."""
        uses = {
            "mysql": ("sql",),
            "dns": ("dns",),
            "catcher": ("smtp",),
            "api-1": ("grpc",),
            **dict.fromkeys(
                self.kafka_names(), ("client", "controller", *(("internal",) if self.secure else ()))
            ),
            **dict.fromkeys(self.service_names(), ("http",)),
            **dict.fromkeys(self.replica_names("api"), ("http", "grpc")),
        }
        for name, needed in uses.items():
            for use in needed:
                self.port(name, use)

    def prefer_api_port(self, port: int) -> None:
        """Let the first api listen on `port` when it is free; 0: on any. Call it while nothing runs."""
        mine = self.ports.setdefault("api-1", {})
        if port and mine.get("grpc") != port and claim(port):
            mine["grpc"] = port

    def release_ports(self) -> None:
        """Let other stacks choose these ports. This one reuses those that are still free at the next `up`."""
        release([port for uses in self.ports.values() for port in uses.values()])

    def drop_busy_ports(self, running: Collection[str] = ()) -> None:
        """Forget the ports that others took: all of them while nothing runs, else those of ended services.

        While a process runs, the servers' addresses are fixed, since other processes have them.
        """
        for name, uses in list(self.ports.items()):
            if name in running or (running and name.rpartition("-")[0] not in SERVICES):
                continue
            self.ports[name] = {use: port for use, port in uses.items() if is_free(port)}

    def kafka_names(self) -> list[str]:
        """Return the names of the Kafka nodes."""
        return [f"kafka-{number}" for number in range(1, self.kafka_nodes + 1)]

    def replica_names(self, service: str) -> list[str]:
        """Return the names of the replicas of a service."""
        return [f"{service}-{number}" for number in range(1, self.replicas.get(service, 0) + 1)]

    def service_names(self) -> list[str]:
        """Return the names of all replicas of all services."""
        return [name for service in SERVICES for name in self.replica_names(service)]
