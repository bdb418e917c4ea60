"""Starts, finds and ends the processes of a stack.

A process belongs to a stack when its environment (proc(5), /proc/pid/environ) names the stack's directory and
its own name there. A pid file alone proves nothing: after a crash another process may have its number.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.local.files import write_whole
from deploy.local.layout import Layout

__all__ = ["end", "environment", "find", "find_all", "log_tail", "resident_bytes", "spawn"]

NAME = "POSTROAD_LOCAL_NAME"
DIRECTORY = "POSTROAD_LOCAL_DIR"
# After this long (seconds) an end that is waited for is named on stderr.
_SILENCE = 5.0


def spawn(
    layout: Layout, name: str, argv: Sequence[str], env: Mapping[str, str], cwd: Path | None = None
) -> int:
    """Start `name` in a session of its own, with its output in its log. Return its pid.

    Returns once the program has been executed, so from then on `find` finds it. Raises OSError.
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
    # Popen returns when exec closes its pipe. The kernel shows the new environment a moment later.
    while _identity(child.pid) is None and child.poll() is None:
        time.sleep(0.001)
    # The process outlives this command. A return code keeps Popen from a warning about that.
    child.returncode = child.returncode or 0
    write_whole(layout.pid(name), f"{child.pid}\n", 0o644)
    return child.pid


def _identity(pid: int) -> tuple[str, str] | None:
    """Return the stack directory and the name of a live process that leads its session, else None."""
    variables = environment(pid)
    directory, name = variables.get(DIRECTORY), variables.get(NAME)
    try:
        leads = os.getsid(pid) == pid
    except OSError:
        return None
    return (directory, name) if directory and name and leads else None


def environment(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with; empty when the process is gone."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (item.partition(b"=")[::2] for item in raw.split(b"\0") if item)
    return {os.fsdecode(name): os.fsdecode(value) for name, value in pairs}


def find(layout: Layout, name: str) -> int | None:
    """Return the pid of `name` from its pid file, None when no such process of this stack runs."""
    try:
        pid = int(layout.pid(name).read_text())
    except (OSError, ValueError):
        return None
    return pid if _identity(pid) == (str(layout.root), name) else None


def find_all(layout: Layout) -> dict[str, int]:
    """Return the pids of all running processes of this stack by name, even of those without a pid file."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            identity = _identity(int(entry.name))
            if identity and identity[0] == str(layout.root):
                found[identity[1]] = int(entry.name)
    return found


def _wait_gone(descriptor: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def end(layout: Layout, name: str, grace: float) -> bool:
    """End `name` by SIGTERM, and by SIGKILL after `grace` seconds. With a `grace` of 0, SIGKILL comes first.

    Blocks until the process is gone. Returns whether it ended in time, True also when it did not run. With a
    `grace` of 0 the pid file stays, as it does after a crash.
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
        # The descriptor refers to this one process, even when the kernel reuses its pid.
        if find(layout, name) != pid:
            return True
        if grace > 0:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            # A process that SIGSTOP stopped does not handle SIGTERM.
            signal.pidfd_send_signal(descriptor, signal.SIGCONT)
            if _wait_gone(descriptor, min(grace, _SILENCE)):
                return True
            if grace > _SILENCE:
                more = grace - _SILENCE
                print(f"{name} still drains, for {more:.0f} s at most", file=sys.stderr, flush=True)
                if _wait_gone(descriptor, more):
                    return True
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        _wait_gone(descriptor, 30)
        return False
    except ProcessLookupError:
        return True
    finally:
        os.close(descriptor)


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process in bytes; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def log_tail(layout: Layout, name: str, lines: int = 20) -> str:
    """Return the last lines of a log; empty when it cannot be read."""
    try:
        return "\n".join(layout.log(name).read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
