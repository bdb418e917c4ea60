"""What takes the mail: the catcher, which syncs each mail to disk, or a quick sink, which keeps nothing."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tests.bench.usage import Usage, of_process

__all__ = ["CatcherReceiver", "PythonSink", "Receiver", "SmtpSink", "mails_in", "quick_sink", "slow_sink"]

_SMTP_SINK = "/usr/sbin/smtp-sink"
_STATE = struct.Struct("qq")


class Receiver(Protocol):
    """A running mail server that counts what it took."""

    name: str
    address: tuple[str, int]

    def mails(self) -> int:
        """Return how many mails it has taken so far, copies included."""

    def usage(self) -> dict[str, Usage]:
        """Return what its process has used, by its name, unless it is one of the servers."""


class CatcherReceiver:
    """The local stack's mail catcher, by its journal."""

    name = "catcher"

    def __init__(self, address: tuple[str, int], journal: Path) -> None:
        self.address, self._journal = address, journal
        self._offset, self._mails = 0, 0

    def mails(self) -> int:
        """Return the number of the journal's lines; reads only what is new."""
        if self._journal.exists():
            with self._journal.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
            self._offset += len(new)
            self._mails += new.count(b"\n")
        return self._mails

    def usage(self) -> dict[str, Usage]:
        """Return nothing: the catcher is one of the servers."""
        return {}


class SmtpSink:
    """Postfix's smtp-sink, which writes its counters to `log`."""

    name = "smtp-sink"

    def __init__(self, address: tuple[str, int], pid: int, log: Path) -> None:
        self.address, self._pid, self._log = address, pid, log

    def mails(self) -> int:
        """Return the last count in its output."""
        with self._log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 400))
            return mails_in(file.read())

    def usage(self) -> dict[str, Usage]:
        """Return what it has used."""
        return {"sink": of_process(self._pid)}


def mails_in(tail: bytes) -> int:
    """Return the last whole number after `mesg=` in the end of smtp-sink's output, or 0."""
    lines = tail.replace(b"\r", b"\n").split(b"\n")
    for line in reversed(lines[:-1] if len(lines) > 1 else lines):
        if b"mesg=" in line and (word := line.partition(b"mesg=")[2].split()[:1]):
            return int(word[0])
    return 0


class PythonSink:
    """`tests.bench.smtp_sink`, which keeps its count and its delay in a file that both sides map."""

    name = "sink"

    def __init__(self, address: tuple[str, int], pid: int, state: Path) -> None:
        self.address, self._pid, self._state = address, pid, state

    def mails(self) -> int:
        """Return its count."""
        mails, _ = _STATE.unpack(self._state.read_bytes())
        return int(mails)

    def take(self, milliseconds: int) -> None:
        """Let each further mail take so long until its reply."""
        with self._state.open("r+b") as file:
            file.seek(8)
            file.write(struct.pack("q", milliseconds))

    def usage(self) -> dict[str, Usage]:
        """Return what it has used."""
        return {"sink": of_process(self._pid)}


@contextmanager
def quick_sink() -> Iterator[Receiver]:
    """Run Postfix's smtp-sink where it is installed, else the sink in Python."""
    if not Path(_SMTP_SINK).exists():
        with slow_sink(0) as sink:
            yield sink
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # Only root can listen for another user, and smtp-sink does not run as root.
    user = ["-u", "nobody"] if os.geteuid() == 0 else []
    argv = [_SMTP_SINK, *user, "-c", f"127.0.0.1:{port}", "1000"]
    with tempfile.TemporaryDirectory(prefix="postroad-bench-") as directory:
        log = Path(directory) / "sink"
        with log.open("wb") as output, subprocess.Popen(argv, stdout=output, stderr=output) as process:
            try:
                _wait_for(port, process)
                yield SmtpSink(("127.0.0.1", port), process.pid, log)
            finally:
                process.terminate()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.05)


@contextmanager
def slow_sink(milliseconds: int) -> Iterator[PythonSink]:
    """Run the sink in Python within the block; each mail takes so many milliseconds until its reply."""
    with tempfile.TemporaryDirectory(prefix="postroad-bench-") as directory:
        state = Path(directory) / "state"
        state.write_bytes(_STATE.pack(0, milliseconds))
        argv = [sys.executable, "-m", "tests.bench.smtp_sink", str(state)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                port = int(process.stdout.readline())
                yield PythonSink(("127.0.0.1", port), process.pid, state)
            finally:
                process.terminate()
