"""docs/architecture.md names files that exist, and every file of the stage runtime."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
SOURCES = [path for top in ("services", "tests") for path in (ROOT / top).rglob("*.py")]


def test_every_file_that_the_page_names_exists() -> None:
    known = ["/" + str(path.relative_to(ROOT)) for path in SOURCES]
    named = set(re.findall(r"[\w/]+\.py\b", PAGE))
    assert len(named) > 30
    assert [name for name in sorted(named) if not any(path.endswith("/" + name) for path in known)] == []


def test_every_folder_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(services/[\w/]+)`", PAGE))
    assert [name for name in sorted(named) if not (ROOT / name).is_dir()] == []


def test_the_page_names_every_file_of_the_runtime() -> None:
    files = {path.name for path in (ROOT / "services/common/stage").glob("*.py")} - {
        "__init__.py",
        "metrics.py",
    }
    assert sorted(name for name in files if name not in PAGE) == []
