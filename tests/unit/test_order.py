"""Tests that share costly fixtures run on one worker: what `--dist loadgroup` must do for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_TWO = """
import pytest

@pytest.mark.xdist_group("shared")
@pytest.mark.parametrize("number", range(4))
def test(number): pass
"""


def test_the_tests_of_a_group_run_on_one_worker(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(_TWO)
    argv = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-v", "--rootdir", "."]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    passed = [line for line in done.stdout.splitlines() if "PASSED" in line]
    assert len(passed) == 4, done.stdout
    assert all("@shared" in line for line in passed)
    assert len({line.split()[0] for line in passed}) == 1
