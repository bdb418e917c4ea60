"""What is said to the person at the terminal, on stderr: questions, progress, remarks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from services.cli.errors import FAILED, USAGE, Failure

__all__ = ["Bar", "confirm", "progress", "say"]


class Bar(Protocol):
    """How far something is."""

    def advance(self, steps: int = 1) -> None:
        """It went on by so many steps."""

    def total(self, steps: int) -> None:
        """It has so many steps in all."""

    def note(self, text: str) -> None:
        """Show a few words beside the bar."""


def say(line: str) -> None:
    """Write a line for people to stderr."""
    print(line, file=sys.stderr)


def confirm(question: str, yes: bool) -> None:
    """Return where the user agrees, by --yes or at the terminal; raise Failure otherwise. Blocks."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise Failure("this asks for confirmation, and there is no terminal to ask at: use --yes", USAGE)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise Failure("nothing was done", FAILED)


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Bar]:
    """Show a bar on stderr, on a terminal only; `total` None: not known yet."""
    if not sys.stderr.isatty():
        yield _Silent()
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
        yield _Rich(bars, bars.add_task(what, total=total, note=""))


class _Silent:
    def advance(self, steps: int = 1) -> None:
        pass

    def total(self, steps: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Rich:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._task, steps)

    def total(self, steps: int) -> None:
        self._bars.update(self._task, total=steps)

    def note(self, text: str) -> None:
        self._bars.update(self._task, note=text)
