"""The paths of a stack. All are under one directory, so several stacks can run side by side."""

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
        """Return the layout of the stack that POSTROAD_LOCAL_DIR names, or of this clone's own."""
        return cls(Path(os.environ.get("POSTROAD_LOCAL_DIR") or ROOT / ".local").absolute())

    @property
    def lock(self) -> Path:
        """The file that a command locks while it changes the stack."""
        return self.root / "lock"

    @property
    def state(self) -> Path:
        """The file that holds a StackState: ports, replicas, the variables given at `up`."""
        return self.root / "state.json"

    @property
    def env(self) -> Path:
        """`stack.env`: the `KEY=value` lines for clients of the stack."""
        return self.root / "stack.env"

    @property
    def mail(self) -> Path:
        """The directory of the catcher's journal, its control file and the messages."""
        return self.root / "mail"

    @property
    def dns(self) -> Path:
        """The directory of the name server's control file."""
        return self.root / "dns"

    def data(self, name: str) -> Path:
        """Return the data directory of one server."""
        return self.root / "data" / name

    def pid(self, name: str) -> Path:
        """Return the path of the file that holds the process id of `name`."""
        return self.root / "pids" / f"{name}.pid"

    def log(self, name: str) -> Path:
        """Return the path of the log of `name`: its stdout and stderr."""
        return self.root / "logs" / f"{name}.log"

    def names_in(self, directory: str, suffix: str) -> list[str]:
        """Return the process names that have a file with this suffix in this directory, sorted."""
        return sorted(path.name.removesuffix(suffix) for path in (self.root / directory).glob(f"*{suffix}"))
