"""`python -m tools.prose [FILE ...]` checks the language of documents and of modules: texts and names.

It prints each finding as `path:line: text` and then exits with code 1. A finding is:

- a word that docs/glossary.md rules out, in a document, a docstring, a comment, a string or a name;
- a sentence with more than `LONGEST` words, in a document or a docstring;
- whatever proselint finds in a document, a docstring or a comment.

Without arguments it checks all files.
"""

from __future__ import annotations

import ast
import re
import sys
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import NamedTuple

from proselint.checks import __register__ as proselint_checks
from proselint.config import DEFAULT
from proselint.registry import CheckRegistry
from proselint.tools import LintFile

__all__ = ["LONGEST", "Finding", "Glossary", "findings", "main"]

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT / "docs/glossary.md"
LONGEST = 25

# Texts are ASCII, "resume" is the verb, both spellings of English occur, and a count may be "in all".
_NOT_ASKED = ("typography.symbols", "typography.diacritical_marks", "spelling", "uncomparables")
# The first prefix of a check's name decides whether it is asked.
_CHECKS = dict.fromkeys(_NOT_ASKED, False) | {
    k: v for k, v in DEFAULT["checks"].items() if k not in _NOT_ASKED
}
CheckRegistry().register_many(proselint_checks)

# These files name the words that the glossary rules out.
_ABOUT_WORDS = (GLOSSARY, ROOT / "tests/unit/test_prose.py")
_FOLDERS = ("deploy", "docs", "services", "tests", "tools")

_CODE = re.compile(r"(`+)[^`]*\1")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
# An item of a list, or a docstring's "name: meaning" under "Args:".
_ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+|\s+\*{0,2}\w+:\s")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*`]*[A-Z`])")
_WORD = re.compile(r"[^\W_][\w'./:@%+-]*")
_WORD_OF_NAME = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_COMMENT = re.compile(r"(?:^|\s)#\s(?!noqa|type:)(.*)")


class Text(NamedTuple):
    """A paragraph, an item of a list, a cell of a table, a comment or a string."""

    line: int
    text: str
    kind: str  # "prose", "comment" or "string"

    @property
    def plain(self) -> str:
        """The text without the targets of its links; what is code in it is one word."""
        number = count(1)
        return _LINK.sub(r"\1", _CODE.sub(lambda _: f"Code{next(number)}", self.text))


class Finding(NamedTuple):
    """Something to correct."""

    path: Path
    line: int
    text: str


class Glossary:
    """The words that a glossary rules out."""

    def __init__(self, document: str) -> None:
        """Read the tables of `document`: term, meaning, neither name nor text, no name."""
        rows = [
            [cell.strip() for cell in line.split("|")]
            for line in document.splitlines()
            if line.startswith("| ") and not line.startswith(("| term ", "| --- "))
        ]
        self._nowhere = {word: row[1] for row in rows for word in _listed(row[3])}
        self._no_name = self._nowhere | {word: row[1] for row in rows for word in _listed(row[4])}
        terms = sorted((row[1] for row in rows), key=len, reverse=True)
        self._terms = re.compile(rf"\b(?:{'|'.join(map(re.escape, terms))})s?\b")
        self._in_text = _any_of(word for word in self._nowhere if word.islower())
        self._in_name = _any_of(word for word in self._no_name if word.islower())

    def in_text(self, text: str) -> Iterator[str]:
        """Yield what the glossary has against `text`."""
        for word in self._in_text.findall(self._terms.sub("", text.lower())):
            yield f'"{word}": the term is "{self._nowhere[word]}"'

    def in_name(self, name: str) -> Iterator[str]:
        """Yield what the glossary has against `name`; a test's name is read as a text."""
        words = " ".join(_WORD_OF_NAME.findall(name)).lower()
        if name.startswith("test_"):
            yield from self.in_text(words)
            return
        wrong = [name] if name in self._no_name else self._in_name.findall(self._terms.sub("", words))
        for word in wrong:
            yield f'name "{name}": the term is "{self._no_name[word]}"'


def _listed(cell: str) -> list[str]:
    return [word.strip("` ").replace("_", " ") for word in cell.split(",") if word.strip("` ")]


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b")


def texts_of_document(document: str, first_line: int = 1) -> Iterator[Text]:
    """Yield the texts of a document or a docstring in Markdown; its code is left out."""
    lines: list[str] = []
    start = first_line
    fenced = False
    for number, line in enumerate([*document.splitlines(), ""], first_line):
        bare = line.strip()
        begins = _ITEM.match(line)
        is_code = (
            fenced
            or bare.startswith(("```", ">>>"))
            or (line.startswith("    ") and not lines and not begins)
        )
        if bare.startswith("```"):
            fenced = not fenced
        if lines and (is_code or begins or not bare or bare.startswith(("|", "#", "<!--"))):
            yield Text(start, " ".join(lines), "prose")
            lines = []
        if is_code or not bare or bare.startswith("<!--"):
            continue
        if bare.startswith("|"):
            cells = re.split(r"(?<!\\)\|", bare)
            yield from (Text(number, cell.strip(), "prose") for cell in cells if cell.strip(" :-"))
        elif bare.startswith("#"):
            yield Text(number, bare.lstrip("# "), "prose")
        else:
            start = start if lines else number
            lines.append(line[begins.end() :] if begins else bare)


def texts_of_module(nodes: Sequence[ast.AST], source: str) -> Iterator[Text]:
    """Yield the docstrings, the comments and the strings of a Python module."""
    docstrings = set()
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                docstrings.add(node.body[0].value)  # type: ignore[attr-defined]
                yield from texts_of_document(docstring, node.body[0].lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield Text(node.lineno, node.value, "string")
    comment: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""], 1):
        # A line of a string may look like a comment: its words count as well.
        found = _COMMENT.search(line)
        if comment and not (found and line[: found.start()].isspace() | (found.start() == 0)):
            yield Text(number - len(comment), " ".join(comment), "comment")
            comment = []
        if found:
            comment.append(found[1])


def names_of_module(nodes: Sequence[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each class, function, parameter, variable and field of a module."""
    for node in nodes:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case (
                ast.arg(arg=name)
                | ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(attr=name, ctx=ast.Store())
            ):
                yield node.lineno, name


def findings(paths: Iterable[Path], glossary: Glossary) -> list[Finding]:
    """Return what is wrong in documents and Python modules, by file and line."""
    found: set[Finding] = set()
    asked: list[tuple[Path, Text]] = []
    for path in paths:
        source = path.read_text()
        if path.suffix == ".py":
            nodes = list(ast.walk(ast.parse(source)))
            texts = list(texts_of_module(nodes, source))
            for line, name in ((1, path.stem), *names_of_module(nodes)):
                found.update(Finding(path, line, text) for text in glossary.in_name(name))
        else:
            texts = list(texts_of_document(source))
        for text in texts:
            found.update(Finding(path, text.line, finding) for finding in _in_text(text, glossary))
        asked += [(path, text) for text in texts if text.kind != "string"]
    return sorted(found.union(_from_proselint(asked)))


def _in_text(text: Text, glossary: Glossary) -> Iterator[str]:
    plain = text.plain
    yield from glossary.in_text(plain)
    for sentence in _SENTENCE_END.split(plain) if text.kind == "prose" else ():
        if (words := len(_WORD.findall(sentence))) > LONGEST:
            yield f"{words} words, {LONGEST} at most: {sentence[:50]}..."


def _from_proselint(asked: Sequence[tuple[Path, Text]]) -> Iterator[Finding]:
    """Ask proselint about all texts at once, which costs it little more than a single one."""
    plain = [re.sub(r'["\s]+', " ", text.plain) + ".\n\n" for _, text in asked]
    ends = list(accumulate(map(len, plain)))
    joined = "".join(plain)
    for result in LintFile("texts", joined).lint({"max_errors": 1000, "checks": _CHECKS}) if joined else ():
        # proselint counts from a line end that it puts before the text.
        start, end = (position - 1 for position in result.check_result.span)
        if joined[end - 1 : end + 1].isalpha():  # an expression that ends amid a word
            continue
        path, text = asked[bisect(ends, (start + end) // 2)]
        yield Finding(path, text.line, result.check_result.message)


def _all_files() -> list[Path]:
    """Return the project's documents and modules; no need for Git, which an unpacked archive lacks."""
    below = (path for folder in _FOLDERS for path in (ROOT / folder).rglob("*.[mp][dy]"))
    return sorted(path for path in (*ROOT.glob("*.md"), *below) if path not in _ABOUT_WORDS)


def main(arguments: Sequence[str]) -> int:
    """Print the findings in the files that `arguments` name; return 1 if there are any, else 0."""
    found = findings(
        [Path(name).resolve() for name in arguments] or _all_files(), Glossary(GLOSSARY.read_text())
    )
    for path, line, text in found:
        print(f"{path.relative_to(ROOT)}:{line}: {text}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
