"""Finds the commands that the documents tell a reader to type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "Command", "commands", "programs", "python_samples"]

ROOT = Path(__file__).resolve().parents[1]

_PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:postroad|\.venv/bin/postroad|docker|make|openssl|python3|grpcurl|curl|kafka-[a-z-]+\.sh|SELECT)\s"
)
# The fenced blocks are for other programs; a reader does not type them.
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """One command with all its lines; `text` is what a reader copies."""

    document: str
    text: str


def commands(document: str) -> list[Command]:
    """Return the commands of a document, each once: first those of code blocks, then those within lines."""
    blocks, prose = _split(document)
    found = [line for line in blocks if _PROGRAM.match(line)]
    for line in re.findall(r"`([^`\n]+)`", "\n".join(prose)):
        if _PROGRAM.match(line) and "..." not in line and "COMMAND" not in line:
            found.append(line)
    return [Command(document, text) for text in dict.fromkeys(found)]


def programs(document: str) -> set[str]:
    """Return the first word of each line of a code block that is no command."""
    return {line.split()[0] for line in _split(document)[0] if not _PROGRAM.match(line)}


def python_samples(document: str) -> list[str]:
    """Return the document's blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def _split(document: str) -> tuple[list[str], list[str]]:
    """Return the lines of a document's indented blocks, continuation lines joined, and all other lines."""
    blocks: list[str] = []
    prose = [""]
    within = False
    for line in _FENCE.sub("", (ROOT / document).read_text()).splitlines():
        # A block follows an empty line. Any other indented line continues an item of a list.
        within = line.startswith("    ") and (within or not prose[-1].strip())
        if not within:
            prose.append(line)
        elif blocks and blocks[-1].endswith(("\\", "|")):
            blocks[-1] += "\n" + _bare(line.strip())
        else:
            blocks.append(_bare(line.strip()))
    return blocks, prose


def _bare(line: str) -> str:
    """Return a line of a block without its trailing comment."""
    return re.sub(r"\s{2,}# .*$", "", line).rstrip()
