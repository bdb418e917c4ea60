"""The `postroad` command as a process: with pipes, or on a terminal of a given width."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forked

__all__ = ["Command", "Done", "Following"]

ROOT = Path(__file__).resolve().parents[1]
ARGV = [sys.executable, "-m", "services.cli"]
# Without job control, a shell makes its background processes, and their children, ignore Ctrl-C.
LISTENING = [
    sys.executable,
    "-c",
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " runpy.run_module('services.cli', run_name='__main__', alter_sys=True)",
]


@dataclass(frozen=True)
class Done:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Its result, line by line."""
        return self.out.splitlines()

    @property
    def json(self) -> Any:
        """Its result, as one document."""
        return json.loads(self.out)

    @property
    def objects(self) -> list[Any]:
        """Its result, an object a line."""
        return [json.loads(line) for line in self.lines]


class Following:
    """A command that still runs; `objects` is what it has written so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self.objects, self._errors = process, list[Any](), list[str]()
        self.code: int | None = None
        self._threads = [threading.Thread(target=self._read_out), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read_out(self) -> None:
        assert self._process.stdout is not None
        self.objects.extend(map(json.loads, self._process.stdout))

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(line.rstrip("\n") for line in self._process.stderr)

    @property
    def errors(self) -> list[str]:
        """Its lines on stderr so far."""
        return list(self._errors)

    def end(self) -> None:
        """Return once it has ended and all it wrote is here."""
        self.code = self._process.wait(30)
        for thread in self._threads:
            thread.join(30)


class Command:
    """Runs `postroad` with these variables and no others of Postroad's."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("POSTROAD_", "EMAIL_"))}
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
            clean.pop(name, None)
        self.environment = (
            clean | {"POSTROAD_CONFIG": os.devnull, "TERM": "xterm-256color"} | dict(environment or {})
        )

    def __call__(self, *arguments: str, given: str = "", **variables: str) -> Done:
        """Run it with pipes; `given` is its stdin."""
        done = forked.run("services.cli", arguments, self.environment | variables, given=given, seconds=90)
        return Done(*done)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start it with pipes and leave it running; it obeys Ctrl-C however the tests were started."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*LISTENING, *arguments], env=self.environment, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload,no-any-return]

    @contextlib.contextmanager
    def following(self, *arguments: str) -> Iterator[Following]:
        """Start it with pipes. At the end of the block, send it Ctrl-C and wait for it."""
        process = self.start(*arguments)
        following = Following(process)
        try:
            yield following
        finally:
            process.send_signal(signal.SIGINT)
            following.end()

    def on_terminal(
        self,
        *arguments: str,
        columns: int = 80,
        typed: str = "",
        act: Callable[[forked.Process, str], None] | None = None,
        **variables: str,
    ) -> Done:
        """Run it with stdin, stdout and stderr on terminals of this width.

        `typed` is what the user types. `act` is called with the process and its output so far whenever there
        is more of it.
        """
        pairs = [pty.openpty() for _ in range(3)]
        for _, slave in pairs:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        stdin, stdout, stderr = (os.ttyname(slave) for _, slave in pairs)
        environment = self.environment | variables
        process = forked.Process("services.cli", arguments, environment, (stdin, stdout, stderr))
        os.write(pairs[0][0], typed.encode())
        masters, texts, end = {pairs[1][0]: 0, pairs[2][0]: 1}, ["", ""], time.monotonic() + 90
        slaves = [slave for _, slave in pairs]
        while masters:
            assert time.monotonic() < end, f"still running: {texts}"
            if slaves and process.poll() is not None:
                # Nobody has the terminal open any more, so its end can be read.
                while slaves:
                    os.close(slaves.pop())
            for master in select.select(list(masters), [], [], 0.05)[0]:
                try:
                    data = os.read(master, 65536)
                except OSError:  # EIO: the other side is closed
                    data = b""
                if not data:
                    del masters[master]
                    continue
                texts[masters[master]] += data.decode().replace("\r\n", "\n")
                if act is not None:
                    act(process, texts[0])
        for master, _ in pairs:
            os.close(master)
        return Done(process.wait(30), *texts)
