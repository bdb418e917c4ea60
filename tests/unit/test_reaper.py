"""Whatever of a test run is killed, nothing that it started outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reaper import RUN, running

ROOT = Path(__file__).parents[2]
# A test that starts a process as the local stack does, and others whose parent is gone; then it hangs.
TESTS = f"""
import os, subprocess, sys, tempfile, time
from pathlib import Path

def test_that_hangs():
    clean = {{k: v for k, v in os.environ.items() if not k.startswith(("POSTROAD_", "EMAIL_"))}}
    Path(tempfile.mkdtemp(prefix="postroad-"), "data").write_text("data")
    subprocess.Popen(["sleep", "600"], env=clean, start_new_session=True)
    subprocess.run(["setsid", "sh", "-c", "sleep 600 & sleep 600 &"], env=clean, check=True)
    Path("report.tmp").write_text(f"{{os.getpid()}} {{os.environ[{RUN!r}]}}")
    Path("report.tmp").rename("report")
    time.sleep(600)
"""


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("dies", ["worker", "controller", "make"])
def test_nothing_outlives_a_run_of_which_something_is_killed(tmp_path: Path, dies: str) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    options = "-p xdist -p tests.reaper -n 1 --max-worker-restart=0 -c pytest.ini"
    pytest_ = f"{sys.executable} -m pytest {options} test_it.py"
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "Makefile").write_text(f"test:\n\t@{pytest_}\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "POSTROAD_"))}
    begun = subprocess.Popen(
        ["make", "test"] if dies == "make" else pytest_.split(),
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    report = tmp_path / "report"
    try:
        until(report.exists)
        worker, run = report.read_text().split()
        # The worker, and what it started.
        assert len(running(run)) >= 4
        os.kill(int(worker) if dies == "worker" else begun.pid, signal.SIGKILL)
        until(lambda: not running(run))
        until(lambda: not Path(run).exists())
    finally:
        begun.kill()
        begun.wait()
