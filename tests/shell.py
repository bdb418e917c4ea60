"""A shell that runs commands as a reader would type them, in a clone whose stack is up.

`postroad` and `grpcurl` on its PATH are small programs. Each has tests/forked.py run the command with its own
streams and directory, because starting Python takes longer than most commands.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tests import forked
from tests.documents import ROOT

__all__ = ["Done", "Shell"]

# The settings of the user who runs the tests, and what make passes on from its own command line.
_LEFT_OUT = ("POSTROAD_", "EMAIL_", "MAKE", "MFLAGS", "ARGS")

# Its one parameter is its own name, so that one text serves all.
_CLIENT = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect({socket!r})
    request = {{"pid": os.getpid(), "module": {module!r}, "arguments": sys.argv[1:], "directory": os.getcwd(),
            "environment": dict(os.environ)}}
    link.sendall(json.dumps(request).encode())
    link.shutdown(socket.SHUT_WR)
    code = int(link.recv(16) or b"255")
os._exit(code if code >= 0 else 128 - code)
"""


class Done(NamedTuple):
    """A command that has ended. `errors` is what it wrote to the terminal, questions included."""

    code: int
    output: str
    errors: str


class Shell:
    """Runs commands in `directory`, which it makes: a clone of this project whose stack is `stack`.

    `environment` is set beside PATH and HOME. A context manager.
    """

    def __init__(self, directory: Path, stack: Path, environment: Mapping[str, str]) -> None:
        self.directory = directory / "clone"
        self._make_clone(stack)
        programs = directory / "bin"
        programs.mkdir()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "socket"))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()
        self._client(programs / "postroad", "services.cli")
        (self.directory / ".venv/bin/postroad").symlink_to(programs / "postroad")
        if not shutil.which("grpcurl"):
            self._client(programs / "grpcurl", "tests.grpcurl")
        # `make test` has set everything up.
        _script(programs / "make", f'exec {shutil.which("make")} -o setup "$@"')
        clean = {k: v for k, v in os.environ.items() if not k.startswith(_LEFT_OUT)}
        self._environment = {
            **clean,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(directory),
            **environment,
        }

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def run(self, text: str, seconds: float = 60, **environment: str) -> Done:
        """Run a command and answer yes to its questions. Blocks; raises subprocess.TimeoutExpired."""
        ours, theirs = pty.openpty()
        try:
            os.write(ours, b"y\n" * 3)
            with subprocess.Popen(
                ["bash", "-c", text],
                cwd=self.directory,
                env={**self._environment, **environment},
                stdin=theirs,
                stdout=subprocess.PIPE,
                stderr=theirs,
                text=True,
                start_new_session=True,
            ) as process:
                written: list[bytes] = []
                reader = threading.Thread(target=_read, args=(ours, written))
                reader.start()
                try:
                    output, _ = process.communicate(timeout=seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
                finally:
                    os.close(theirs)
                    reader.join(5)
            return Done(process.returncode, output, b"".join(written).decode(errors="replace"))
        finally:
            os.close(ours)

    def _make_clone(self, stack: Path) -> None:
        self.directory.mkdir(parents=True)
        for entry in ROOT.iterdir():
            if entry.name not in {".local", ".venv", ".git"}:
                (self.directory / entry.name).symlink_to(entry)
        (self.directory / ".local").symlink_to(stack)
        programs = self.directory / ".venv/bin"
        programs.mkdir(parents=True)
        for entry in (ROOT / ".venv/bin").iterdir():
            if entry.name != "postroad":
                (programs / entry.name).symlink_to(entry)

    def _client(self, path: Path, module: str) -> None:
        text = _CLIENT.format(python=sys.executable, socket=self._listener.getsockname(), module=module)
        path.write_text(text)
        path.chmod(0o755)

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=_answer, args=(link,), daemon=True).start()


def _answer(link: socket.socket) -> None:
    with link, link.makefile("rb") as stream:
        request = json.loads(stream.read())
        at = f"/proc/{request['pid']}/fd"
        streams = (f"{at}/0", f"{at}/1", f"{at}/2")
        process = forked.Process(
            request["module"], request["arguments"], request["environment"], streams, request["directory"]
        )
        link.sendall(str(process.wait()).encode())


def _read(terminal: int, written: list[bytes]) -> None:
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # nobody has the other end open any more
            return
        if not part:
            return
        written.append(part)


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
