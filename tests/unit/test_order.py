"""Tests that break their servers are one group of pytest-xdist's, and run without it as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reaper import RUN

ROOT = Path(__file__).parents[2]
TEST = """
import pytest

@pytest.mark.breaks_servers
def test_its_group(request):
    group = request.node.get_closest_marker("xdist_group")
    assert (group.args if group else ()) == {}
"""


@pytest.mark.parametrize(("plugin", "group"), [("xdist", ("breaks_servers",)), ("no:xdist", ())])
def test_a_group_is_named_where_there_is_xdist(tmp_path: Path, plugin: str, group: tuple[str, ...]) -> None:
    (tmp_path / "test_it.py").write_text(TEST.format(repr(group)))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = breaks_servers\n")
    options = f"-p tests.order -p {plugin} -c pytest.ini --strict-markers test_it.py"
    clean = {k: v for k, v in os.environ.items() if k == RUN or not k.startswith(("PYTEST_", "POSTROAD_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options.split()],
        cwd=tmp_path,
        env=clean | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
