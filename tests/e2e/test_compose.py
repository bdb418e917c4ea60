"""Runs the Docker commands of README.md and docs/operations.md, in the order of a day.

It needs containers. So it runs only if `POSTROAD_TEST_COMPOSE` names `docker compose`, or another program
that takes its arguments. Ports 50051 and 8025 must be free.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.documents import ROOT, commands

COMPOSE = os.environ.get("POSTROAD_TEST_COMPOSE", "")
ALL = dict.fromkeys(c.text for document in ("README.md", "docs/operations.md") for c in commands(document))
DOCKER = [text for text in ALL if "docker compose" in text]
UP, DOWN, STOP = "docker compose up --build -d", "docker compose down", "docker compose stop sender"
CREATE = next(text for text in ALL if "TaskService/Create" in text)

needs_containers = pytest.mark.skipif(not COMPOSE, reason="POSTROAD_TEST_COMPOSE names no docker compose")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Return a function that runs a command word for word and returns its output; remove all afterwards."""
    programs = tmp_path_factory.mktemp("bin")
    # Docker enables the profile of a service that one runs by name; podman-compose needs the option.
    branch = f'if [ "$2" = run ]; then shift; exec {COMPOSE} --profile postroad "$@"; fi'
    _script(programs / "docker", f'{branch}\nshift; exec {COMPOSE} "$@"')
    if not any((Path(folder) / "grpcurl").exists() for folder in os.environ["PATH"].split(":")):
        _script(programs / "grpcurl", f'cd {ROOT}; exec {ROOT}/.venv/bin/python -m tests.grpcurl "$@"')
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("POSTROAD_", "EMAIL_"))}
    # It has a project name of its own: `down` must not touch the reader's.
    env = {
        **clean,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "COMPOSE_PROJECT_NAME": "postroad-test",
    }

    def run(text: str) -> str:
        done = subprocess.run(
            ["bash", "-c", text], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    try:
        yield run
    finally:
        run("docker compose down -v")


@needs_containers
@pytest.mark.timeout(1800)
def test_a_day_with_docker(run: Callable[[str], str]) -> None:
    run(UP)
    _until(lambda: bool(run(CREATE)), 180)
    _until(lambda: "ada@good.test" in _mailpit(), 120)
    others = [text for text in DOCKER if text not in (UP, DOWN, STOP)]
    for text in others:
        run(text)
    run(STOP)
    run(DOWN)


def test_each_docker_command_runs() -> None:
    assert {UP, DOWN, STOP} <= set(DOCKER)


def _mailpit() -> str:
    with urllib.request.urlopen("http://127.0.0.1:8025/api/v1/messages", timeout=10) as answer:
        return json.dumps(json.load(answer))


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
            problem: object = "it is not so"
        except (AssertionError, OSError) as error:
            problem = error
        assert time.monotonic() < end, problem
        time.sleep(1)


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
