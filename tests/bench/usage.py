"""CPU time and memory of the local stack's processes, from /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usage", "usage"]

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process has used: CPU seconds (user and system) and resident megabytes."""

    cpu_seconds: float
    resident_mb: float


def usage(pids: Path) -> dict[str, Usage]:
    """Return the usage of each process by the name of its pid file in `pids`; the dead are left out."""
    found = {}
    for file in sorted(pids.glob("*.pid")):
        proc = Path("/proc", file.read_text().strip())
        try:
            fields = (proc / "stat").read_text().rpartition(")")[2].split()
            status = (proc / "status").read_text()
        except FileNotFoundError:
            continue
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        found[file.stem] = Usage((int(fields[11]) + int(fields[12])) / _TICKS, resident / 1024)
    return found
