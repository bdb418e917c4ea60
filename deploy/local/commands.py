"""Runs installers: silently while they succeed, with the end of their output when they fail.

Standard library only: `make setup` runs it on a bare python3.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["SetupError", "run", "say"]


class SetupError(Exception):
    """The installation of something failed. The text is for the person at the terminal."""


def say(text: str) -> None:
    """Print one line of progress on stderr."""
    print(f"setup: {text}", file=sys.stderr, flush=True)


def run(argv: Sequence[str | Path], *, tries: int = 1) -> str:
    """Run a command and return its standard output. Blocks until it ends.

    `tries` above 1 is for downloads: a failed try is repeated after 1, 2, 4 s, since mirrors fail at times.
    Raises SetupError with the last lines of the output if the last try fails, or if the program is missing.
    """
    command = [str(part) for part in argv]
    for attempt in range(1, tries + 1):
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError as error:
            raise SetupError(f"{command[0]} is not installed") from error
        if done.returncode == 0:
            return done.stdout
        if attempt < tries:
            say(f"{Path(command[0]).name} failed (try {attempt} of {tries}), again shortly")
            time.sleep(2 ** (attempt - 1))
    tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
    raise SetupError(f"`{' '.join(command)}` failed with {done.returncode}:\n{tail}")
