"""What documents, docstrings and comments name in code is there: modules, and what a module defines."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = sorted(
    path for folder in ("services", "deploy", "tools", "tests") for path in (ROOT / folder).rglob("*.py")
)
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})
FILES = {"/" + str(path.relative_to(ROOT)) for path in CODE}
# Files that other programs have, or that the reader writes.
ELSEWHERE = {"services/archiver.py"}

# `services.common.fold.delta`
_DOTTED = re.compile(r"`(services(?:\.\w+)+)`")
# `services/common/fold.py` (`delta`), or `may_resend` in `decide.py`
_IN_FILE = (
    re.compile(r"`(?P<file>[\w/]+\.py)` \(`(?P<name>\w+)`\)"),
    re.compile(r"`(?P<name>\w+)` in `(?P<file>[\w/]+\.py)`"),
)
_FILE = re.compile(r"(?<![\w/.-])((?:services|deploy|tools|tests)/[\w/]+\.py)\b")


def _texts() -> Iterator[tuple[Path, str]]:
    yield from ((path, path.read_text()) for path in (*DOCUMENTS, *CODE) if path != Path(__file__))


@cache
def _defined(path: Path) -> frozenset[str]:
    """Return the names that a module defines, those of its classes' attributes among them."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return frozenset(node.name for node in nodes if isinstance(node, kinds)) | {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _exists(dotted: str) -> bool:
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_every_dotted_name_exists() -> None:
    named = {(path.name, name) for path, text in _texts() for name in _DOTTED.findall(text)}
    assert ("add-a-stage.md", "services.common.stage.delays.choose_delay") in named
    assert [(file, name) for file, name in sorted(named) if not _exists(name)] == []


def test_every_name_that_a_text_puts_into_a_file_is_there() -> None:
    named = {
        (path.name, found["file"], found["name"])
        for path, text in _texts()
        for pattern in _IN_FILE
        for found in pattern.finditer(text)
    }
    assert len(named) > 5
    missing = [
        entry
        for entry in sorted(named)
        if not any(
            entry[2] in _defined(path)
            for path in CODE
            if ("/" + str(path.relative_to(ROOT))).endswith("/" + entry[1])
        )
    ]
    assert missing == []


def test_every_path_of_a_module_exists() -> None:
    named = {(path.name, file) for path, text in _texts() for file in _FILE.findall(text)}
    assert len(named) > 50
    assert [
        (name, file) for name, file in sorted(named) if "/" + file not in FILES and file not in ELSEWHERE
    ] == []
