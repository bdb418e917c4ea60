"""CPU time and memory of processes, from /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usage", "of_process", "spent", "usage"]

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process has used: CPU seconds (user and system), resident megabytes now and at most."""

    cpu_seconds: float
    resident_mb: float
    most_resident_mb: float = 0.0


def of_process(pid: int) -> Usage:
    """Return the usage of a process; raises FileNotFoundError if it is dead."""
    proc = Path("/proc", str(pid))
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    status = dict(line.partition(":")[::2] for line in (proc / "status").read_text().splitlines())
    now, most = (int(status.get(name, "0 kB").split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return Usage((int(fields[11]) + int(fields[12])) / _TICKS, now, most)


def usage(pids: Path) -> dict[str, Usage]:
    """Return the usage of each process by the name of its pid file in `pids`; the dead are left out."""
    found = {}
    for file in sorted(pids.glob("*.pid")):
        try:
            found[file.stem] = of_process(int(file.read_text()))
        except FileNotFoundError:
            continue
    return found


def spent(before: Mapping[str, Usage], after: Mapping[str, Usage]) -> dict[str, float]:
    """Return the CPU seconds between two usages by service or server, all its processes together.

    A process that started in between counts whole; one that ended is left out.
    """
    seconds: dict[str, float] = defaultdict(float)
    for name, used in after.items():
        kind = name.rpartition("-")[0] or name
        seconds[kind] += used.cpu_seconds - (before[name].cpu_seconds if name in before else 0.0)
    return dict(seconds)
