"""Where a stack keeps what: everything lies under one directory, so several stacks stand side by side."""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Layout"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of the stack under `root` (`POSTROAD_LOCAL_DIR`, by default `.local` of this clone)."""

    root: Path

    @classmethod
    def from_environment(cls) -> "Layout":
        """The stack that `POSTROAD_LOCAL_DIR` names, or this clone's own."""
        return cls(Path(os.environ.get("POSTROAD_LOCAL_DIR") or ROOT / ".local").absolute())

    @property
    def lock(self) -> Path:
        """Held by whichever command is changing the stack."""
        return self.root / "lock"

    @property
    def state(self) -> Path:
        """What this package remembers: ports, replicas, the variables given at `up`."""
        return self.root / "state.json"

    @property
    def env(self) -> Path:
        """`stack.env`: the `KEY=value` lines for clients of the stack."""
        return self.root / "stack.env"

    @property
    def mail(self) -> Path:
        """The catcher's journal, its control file and the messages."""
        return self.root / "mail"

    @property
    def dns(self) -> Path:
        """The name server's control file."""
        return self.root / "dns"

    def data(self, name: str) -> Path:
        """The data directory of one server."""
        return self.root / "data" / name

    def pid(self, name: str) -> Path:
        """The file that holds the process id of `name`."""
        return self.root / "pids" / f"{name}.pid"

    def log(self, name: str) -> Path:
        """What `name` wrote to stdout and stderr."""
        return self.root / "logs" / f"{name}.log"

    def names_in(self, directory: str, suffix: str) -> list[str]:
        """The process names that have a file in `pids` or `logs`, sorted."""
        return sorted(path.name.removesuffix(suffix) for path in (self.root / directory).glob(f"*{suffix}"))
