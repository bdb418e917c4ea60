"""Ends what a test run started and did not end, however the run itself ends.

A run has one directory for all temporary directories of its tests. Every process that the run starts has its
path in the environment (`RUN`). This marks the process as the run's, whatever its parent or session.

The reaper is a process beside the run. It reads from a pipe whose other end the run's own process holds:
pytest, or the controller of its workers. That end closes with the process, also at SIGKILL. Then the reaper
kills the processes with the mark and deletes the directory.

The reaper also ends the run if the `make` that started it is gone. Servers under `POSTROAD_TEST_INFRA` do not
belong to the run and stay.

conftest.py registers the pytest hooks. The file uses the standard library only, because the reaper runs it.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["RUN", "pytest_configure", "pytest_unconfigure", "running"]

RUN = "PYTEST_RUN_DIRECTORY"
"""The variable that marks a run's processes. Tests that clean an environment leave it there."""
# SIGKILL ends everything, so only a process within a system call takes time.
_TIMEOUT = 30.0
# Linux has it for POSIX shared memory. A run takes up to a third of the size that is asked for here.
_SHARED = "/dev/shm"
_ROOM = 6 << 30
_reapers: list[subprocess.Popen[str]] = []


def pytest_configure(config: Any) -> None:
    """Begin a run, or, in a worker of pytest-xdist, join the controller's."""
    if not hasattr(config, "workerinput"):
        # pytest keeps its directories of the last runs where they are.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        directory = Path(tempfile.mkdtemp(prefix="postroad-test-", dir=_memory()))
        # Servers that drop their rights must still reach their own directories.
        directory.chmod(0o711)
        clean = {name: value for name, value in os.environ.items() if name != RUN}
        reaper = subprocess.Popen(
            [sys.executable, "-I", __file__, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=clean,
            text=True,
            start_new_session=True,
        )
        _reapers.append(reaper)
        os.environ[RUN] = str(directory)
    tempfile.tempdir = os.environ[RUN]


def _memory() -> str | None:
    """Return a file system in memory with enough space for a run; None without one, or if TMPDIR is set.

    Half of what Kafka does for a new topic is to write its files through to a disk.
    """
    if "TMPDIR" in os.environ:
        return None
    try:
        shared = os.statvfs(_SHARED)
        available = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    if available is None or shared.f_flag & os.ST_NOEXEC:
        return None
    room = min(shared.f_bavail * shared.f_frsize, 1024 * int(available[1]))
    return _SHARED if room > _ROOM else None


def pytest_unconfigure(config: Any) -> None:
    """End the run; returns when nothing of it is left, and names what the tests had left."""
    if hasattr(config, "workerinput") or not _reapers:
        return
    tempfile.tempdir = None
    left, _ = _reapers.pop().communicate(timeout=2 * _TIMEOUT)
    if left:
        print(f"left running by the tests, and killed:\n{left}", file=sys.stderr, end="")


def running(directory: str, but: str = "") -> dict[int, str]:
    """Return the command lines of the processes that carry the mark of a run, by process id.

    `but` is the stack whose processes are left out.
    """
    found = {}
    for entry in Path("/proc").iterdir():
        # A process that just ended, or another user's, cannot be read.
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and _is_of(int(entry.name), directory, but):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry.name)] = os.fsdecode(command).strip()
    return found


def _is_of(pid: int, directory: str, but: str) -> bool:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    kept = bool(but) and os.fsencode(f"POSTROAD_LOCAL_DIR={but}") in variables
    return os.fsencode(f"{RUN}={directory}") in variables and not kept


def _kill(pid: int, directory: str, but: str) -> None:
    """Kill the process if it is the run's, and wait until it is gone. Raises OSError if it was already."""
    descriptor = os.pidfd_open(pid)
    try:
        # The descriptor names exactly this process; its number may belong to another one by now.
        if _is_of(pid, directory, but):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            _readable([descriptor], 1)
    finally:
        os.close(descriptor)


def _readable(descriptors: list[int], seconds: float | None = None) -> list[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [ready for ready, _ in poll.poll(None if seconds is None else seconds * 1000)]


def _wait_for_the_end(run: int) -> None:
    """Return when the run (a process id) has closed the pipe; kill it when the `make` that began it ends."""
    pipe = sys.stdin.fileno()
    with contextlib.suppress(OSError):
        process = os.pidfd_open(run)
        parent = int(Path(f"/proc/{run}/stat").read_text().rpartition(")")[2].split()[1])
        maker = os.pidfd_open(parent)
        if Path(f"/proc/{parent}/comm").read_text().strip() in ("make", "gmake"):
            if pipe in _readable([pipe, maker]):
                return
            signal.pidfd_send_signal(process, signal.SIGKILL)
    _readable([pipe])


def _reap(directory: str, but: str) -> dict[int, str]:
    """Kill the processes with the run's mark, and their children; return what there was."""
    killed: dict[int, str] = {}
    end, quiet = time.monotonic() + _TIMEOUT, 0
    # A process that is just starting shows no environment for a moment.
    while quiet < 2 and time.monotonic() < end:
        found = running(directory, but)
        quiet = 0 if found else quiet + 1
        killed |= found
        for pid in found:
            with contextlib.suppress(OSError):
                _kill(pid, directory, but)
        time.sleep(0.02)
    return killed


def _main() -> None:
    directory, kept = sys.argv[1], os.environ.get("POSTROAD_TEST_INFRA")
    but = str(Path(kept).absolute()) if kept else ""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _wait_for_the_end(os.getppid())
    killed = _reap(directory, but)
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write("".join(f"  {pid} {command}\n" for pid, command in killed.items()))


if __name__ == "__main__":
    _main()
