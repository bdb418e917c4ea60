"""What CONTRIBUTING.md asks of the repository itself: the hook, the form of ADRs, the changelog."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADRS = sorted((ROOT / "docs/adr").glob("*.md"))


def test_the_pre_commit_hook_runs_make_check(tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "make $*, GIT_DIR=${GIT_DIR-}"\n')
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GIT_DIR": ".git"}
    done = subprocess.run(
        ["tools/hooks/pre-commit"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "make check, GIT_DIR=\n"


@pytest.mark.parametrize("path", ADRS[1:], ids=lambda path: path.stem)
def test_an_adr_follows_the_template(path: Path) -> None:
    text = path.read_text()
    assert re.match(rf"# {int(path.name[:4])}\. \S", text)
    assert re.search(r"^- Status: (proposed|accepted|superseded by \[ADR \d+\]\(.*\))$", text, re.M)
    assert re.search(r"^- Date: \d{4}-\d\d-\d\d$", text, re.M)
    assert re.findall(r"^## (.*)$", text, re.M) == ["Context", "Decision", "Consequences"]


def test_no_two_adrs_have_a_number() -> None:
    numbers = [path.name[:4] for path in ADRS]
    assert len(numbers) == len(set(numbers)) > 20


def test_the_changelog_has_one_line_a_change() -> None:
    released = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1:]
    for section in (part for release in released for part in release.split("\n### ")[1:]):
        title, *lines = filter(None, section.splitlines())
        assert title in ("Added", "Changed", "Removed", "Fixed")
        assert [line for line in lines if not re.fullmatch(r"- .{1,117}\.|[A-Z].{1,40}:", line)] == []


def test_the_tests_and_modules_that_the_documents_name_are_there() -> None:
    names = {path.name for path in ROOT.glob("*/**/*.py") if not path.parts[len(ROOT.parts)].startswith(".")}
    # docs/add-a-stage.md writes its own modules; its test runs them.
    for document in {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "docs/add-a-stage.md"}:
        for file, test in re.findall(r"\b([a-z]\w+\.py)(?:::(\w+))?`", document.read_text()):
            assert file in names, f"{document.name} names {file}"
            assert not test or any(
                f"def {test}(" in path.read_text() for path in ROOT.glob(f"tests/**/{file}")
            )


def test_no_two_classes_share_a_name() -> None:
    modules = [path for folder in ("services", "deploy") for path in (ROOT / folder).rglob("*.py")]
    counted = Counter(
        name for path in modules for name in re.findall(r"^ *class (\w+)", path.read_text(), re.M)
    )
    assert [name for name, count in counted.items() if count > 1] == []
