"""The checker of the language finds what it says that it finds, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.prose import GLOSSARY, LONGEST, Glossary, findings

TABLES = """
| term | meaning | neither name nor text | no name |
| --- | --- | --- | --- |
| pipeline | all stages | road | |
| dead letter | a record that its stage could not handle | a letter | letter, `Back` |
"""
LONG = " ".join(["It", *(f"goes{n}" for n in range(LONGEST - 1)), "on."])


def found(tmp_path: Path, name: str, text: str) -> list[tuple[int, str]]:
    path = tmp_path / name
    path.write_text(text)
    return [(finding.line, finding.text) for finding in findings([path], Glossary(TABLES))]


@pytest.mark.parametrize(
    "text",
    [
        "The road is long.",
        "| a | The Road. |",
        "- A record goes\n  down the road.",
        "# The road",
    ],
)
def test_a_word_that_the_glossary_rules_out_is_found_in_a_document(tmp_path: Path, text: str) -> None:
    assert [text for _, text in found(tmp_path, "page.md", text)] == ['"road": the term is "pipeline"']


@pytest.mark.parametrize(
    "source",
    [
        '"""The road."""',
        "x = 1  # the road",
        "# the\n# road\nx = 1",
        'x = "on the road"',
        "class RoadMap: ...",
        "def on_the_road(): ...",
        "def f(road): ...",
        "road = 1",
        "x.road = 1",
    ],
)
def test_it_is_found_in_each_part_of_a_module(tmp_path: Path, source: str) -> None:
    assert (
        [text for _, text in found(tmp_path, "module.py", source)]
        == [
            text
            for _, text in found(tmp_path, "module.py", source)
            if text.endswith('the term is "pipeline"')
        ]
        != []
    )


def test_a_words_line_is_that_of_its_text(tmp_path: Path) -> None:
    assert [
        line for line, _ in found(tmp_path, "page.md", "One.\n\nTwo on the\nroad.\n\n- three\n- road\n")
    ] == [3, 7]


@pytest.mark.parametrize(
    "source",
    [
        "class DeadLetter: ...",
        "dead_letters = 1",
        "class Backlog: ...",
        "def test_each_letter_and_digit(): ...",
        '"""Up to 64 letters."""',
        "print(x.road)",
        "import road",
        '"""`road` is code, and so is\n\n    a road\n\nhere.\n"""',
    ],
)
def test_terms_and_what_others_named_are_no_findings(tmp_path: Path, source: str) -> None:
    assert found(tmp_path, "module.py", source) == []


@pytest.mark.parametrize("source", ["letter = 1", "class Back: ...", "def test_a_letter(): ..."])
def test_some_words_are_ruled_out_as_names_alone(tmp_path: Path, source: str) -> None:
    assert len(found(tmp_path, "module.py", source)) == 1


def test_a_long_sentence_is_found_in_documents_and_docstrings_alone(tmp_path: Path) -> None:
    assert [text[:8] for _, text in found(tmp_path, "page.md", LONG)] == [f"{LONGEST + 1} words"]
    assert [text[:8] for _, text in found(tmp_path, "module.py", f'"""{LONG}"""')] == [f"{LONGEST + 1} words"]
    assert found(tmp_path, "module.py", f"# {LONG}\nx = '{LONG}'") == []


@pytest.mark.parametrize(
    "text", [f"```\n{LONG}\n```", f"Code:\n\n    {LONG}", f"`{LONG}`", f"It goes. {LONG[3:].capitalize()}"]
)
def test_code_and_short_sentences_are_not_counted(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, "page.md", text) == []


def test_proselint_is_asked_and_its_findings_have_their_lines(tmp_path: Path) -> None:
    text = "For every record.\n\nIt waits for ever.\n"
    assert found(tmp_path, "page.md", text) == [(3, "'for ever' is archaic.")]


def rows_of_the_glossary() -> list[list[str]]:
    return [line.split("|") for line in GLOSSARY.read_text().splitlines() if line.startswith("| ")]


def test_the_glossary_lists_each_term_once() -> None:
    rows = rows_of_the_glossary()
    assert all(len(row) == 6 for row in rows)
    terms = [row[1].strip() for row in rows if row[1].strip() not in ("term", "---")]
    assert len(terms) == len(set(terms)) > 50


def test_the_classes_that_the_glossary_names_are_the_codes() -> None:
    names = re.findall(r"`([A-Z][a-z]+[A-Z]\w+)`", "".join(row[2] for row in rows_of_the_glossary()))
    modules = [path.read_text() for path in (GLOSSARY.parents[1] / "services").rglob("*.py")]
    assert len(names) > 10
    assert [name for name in names if not any(f"class {name}" in text for text in modules)] == []
