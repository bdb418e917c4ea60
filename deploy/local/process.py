"""One process of the stack: start it, know it for ours, end it.

A process is ours when its environment names this stack's directory and its own name, as the kernel tells it
(proc(5), /proc/pid/environ). A pid file alone proves nothing: after a crash its number may be anyone's.
"""

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.local.files import write_whole
from deploy.local.layout import Layout

__all__ = ["end", "environment", "find", "find_all", "log_tail", "resident_bytes", "spawn"]

NAME = "POSTROAD_LOCAL_NAME"
DIRECTORY = "POSTROAD_LOCAL_DIR"


def spawn(
    layout: Layout, name: str, argv: Sequence[str], env: Mapping[str, str], cwd: Path | None = None
) -> int:
    """Start `name` in a session of its own with its output going to its log; returns its pid.

    Returns once the program has been executed, so from then on `find` knows it. Raises OSError.
    """
    log = layout.log(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**env, DIRECTORY: str(layout.root), NAME: name},
            cwd=cwd,
        )
    # Popen returns when exec has closed its pipe; the kernel shows the new environment a moment later.
    while _marks(child.pid) is None and child.poll() is None:
        time.sleep(0.001)
    # It outlives this command, whoever is its parent then.
    child.returncode = child.returncode or 0
    write_whole(layout.pid(name), f"{child.pid}\n", 0o644)
    return child.pid


def _marks(pid: int) -> tuple[str, str] | None:
    """(stack directory, name) of a process that carries both, leads its session and lives."""
    told = environment(pid)
    directory, name = told.get(DIRECTORY), told.get(NAME)
    try:
        leads = os.getsid(pid) == pid
    except OSError:
        return None
    return (directory, name) if directory and name and leads else None


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty when it is gone."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition(b"=")[::2] for item in raw.split(b"\0") if item)
    return {os.fsdecode(name): os.fsdecode(value) for name, value in pairs}


def find(layout: Layout, name: str) -> int | None:
    """The pid of `name` when it is running and ours, from its pid file."""
    try:
        pid = int(layout.pid(name).read_text())
    except (OSError, ValueError):
        return None
    return pid if _marks(pid) == (str(layout.root), name) else None


def find_all(layout: Layout) -> dict[str, int]:
    """Every running process of this stack by name, pid file or not (a start may have been cut short)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            marks = _marks(int(entry.name))
            if marks and marks[0] == str(layout.root):
                found[marks[1]] = int(entry.name)
    return found


def _wait_gone(descriptor: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def end(layout: Layout, name: str, grace: float) -> bool:
    """End `name` by SIGTERM, and by SIGKILL once `grace` seconds are over; 0 kills at once.

    Blocks until it is gone. Returns whether it ended by itself in time (true also when nothing was running).
    One that is killed at once keeps its pid file, as after any other end that nobody planned.
    """
    in_time = _end(layout, name, grace)
    if grace > 0:
        layout.pid(name).unlink(missing_ok=True)
    return in_time


def _end(layout: Layout, name: str, grace: float) -> bool:
    pid = find(layout, name)
    if pid is None:
        return True
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        # The descriptor holds that very process: its number cannot become another's under our hands.
        if find(layout, name) != pid:
            return True
        if grace > 0:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            # One that is stopped (SIGSTOP) would not hear it.
            signal.pidfd_send_signal(descriptor, signal.SIGCONT)
            if _wait_gone(descriptor, grace):
                return True
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        _wait_gone(descriptor, 30)
        return False
    except ProcessLookupError:
        return True
    finally:
        os.close(descriptor)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, in bytes; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def log_tail(layout: Layout, name: str, lines: int = 20) -> str:
    """The last lines of a log, for an error message."""
    try:
        return "\n".join(layout.log(name).read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
