"""The person at the terminal: questions, progress and remarks on stderr, and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from services.cli.errors import FAILED, USAGE, Failure

__all__ = ["OncePerChange", "ProgressBar", "confirm", "progress", "say", "stopped_by_signals"]


class ProgressBar(Protocol):
    """A progress bar, whether it is shown or not."""

    def advance(self, steps: int = 1) -> None:
        """Show so many further steps as done."""

    def total(self, steps: int) -> None:
        """Set the number of all steps."""

    def note(self, text: str) -> None:
        """Show a few words beside the bar."""


def say(line: str) -> None:
    """Write a line for people to stderr."""
    print(line, file=sys.stderr)


def confirm(question: str, yes: bool) -> None:
    """Return if the user agrees, by --yes or at the terminal. Raises Failure otherwise. Blocks."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise Failure("this asks for confirmation, and there is no terminal to ask at: use --yes", USAGE)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise Failure("nothing was done", FAILED)


class OncePerChange:
    """Says a line once, and again only after another one or `forget`: for trouble that lasts."""

    def __init__(self) -> None:
        self._last = ""

    def say(self, line: str) -> None:
        """Write a line for people to stderr, unless it is the last one."""
        if line != self._last:
            self._last = line
            say(line)

    def forget(self) -> None:
        """Have the next line written whatever it is."""
        self._last = ""


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[ProgressBar]:
    """Show a progress bar on stderr, if that is a terminal. `total` None: not known yet."""
    if not sys.stderr.isatty():
        yield _NoBar()
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bars:
        yield _RichBar(bars, bars.add_task(what, total=total, note=""))


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets. The second signal ends the command as usual."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request_stop(_number: int, _frame: object) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, request_stop)
    try:
        yield stop
    finally:
        restore()


class _NoBar:
    def advance(self, steps: int = 1) -> None:
        pass

    def total(self, steps: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _RichBar:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._task, steps)

    def total(self, steps: int) -> None:
        self._bars.update(self._task, total=steps)

    def note(self, text: str) -> None:
        self._bars.update(self._task, note=text)
