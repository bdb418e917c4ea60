"""Runs commands of this project in processes that have imported everything already.

To start Python and import what a command needs costs a second, more than most commands do. One process a
worker has imported it all, and is forked for each command.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path

__all__ = ["Process", "end", "run"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "confluent_kafka.admin",
        "deploy.local.command_line",
        "deploy.local.preparation",
        "grpc",
        "services.cli.channel",
        "services.common.operations.dead_letters.redrive",
        "services.common.operations.lag.monitor",
        "services.api.service",
        "services.cli.main",
        "services.common.operations.rebuild.run",
        "services.common.operations.replay.preview",
        "services.common.migrations",
        "services.common.kafka.topics",
    ]
)


def run(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    given: str = "",
    seconds: float = 240,
) -> tuple[int, str, str]:
    """Run `python -m module arguments`; `given` is its stdin. Return its exit code, stdout and stderr.

    Its working directory is this process's. Blocks; raises TimeoutError after `seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="postroad-command-") as directory:
        streams = [str(Path(directory) / name) for name in ("stdin", "stdout", "stderr")]
        Path(streams[0]).write_text(given)
        process = _context.Process(target=_main, args=(module, list(arguments), dict(environment), streams))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{module} {' '.join(arguments)} still runs after {seconds:g} s")
        return process.exitcode, Path(streams[1]).read_text(), Path(streams[2]).read_text()


class Process:
    """`python -m module arguments`, running. Its methods are `subprocess.Popen`'s.

    `streams` are the paths of what it has for stdin, stdout and stderr, `directory` is its working directory.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        streams: tuple[str, str, str],
        directory: str = ".",
    ) -> None:
        given = (module, list(arguments), dict(environment), list(streams), directory)
        self._process = _context.Process(target=_main, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return its exit code (of a signal, its negative number); None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self._process.kill()

    def wait(self, seconds: float | None = None) -> int:
        """Return its exit code; raises TimeoutError if it still runs after `seconds`."""
        self._process.join(seconds)
        if (code := self._process.exitcode) is None:
            raise TimeoutError(f"process {self.pid} still runs after {seconds:g} s")
        return code


def end() -> None:
    """End the helpers of `multiprocessing`, which the run would count as left over."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
    util._run_finalizers()  # type: ignore[attr-defined]


def _main(
    module: str, arguments: list[str], environment: dict[str, str], streams: list[str], directory: str = "."
) -> None:
    for number, path in enumerate(streams):
        # A reader never sees the end of a pipe that it also has open for writing.
        way = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        opened = os.open(path, way | os.O_NOCTTY)
        os.dup2(opened, number)
        if opened > 2:
            os.close(opened)
    os.chdir(directory)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
