"""The jq recipes of the documents and the help read fields that the commands' JSON has. Needs no jq."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from postroad.v1 import task_pb2
from postroad.v1 import task_service_pb2 as pb
from services.cli import watching
from services.cli.output import Output, OutputFormat
from services.cli.tasks import full_row, task_row
from services.common.operations.dead_letters.dead_letter import (
    DeadLetterLocation,
    group_by_cause,
    parse_dead_letter,
)
from services.common.operations.lag.report import report
from services.common.operations.lag.sampler import LagSample, StageGroup

ROOT = Path(__file__).parents[2]
PATH = r"\.[a-z_]\w*(?:\[\])?(?:\.[a-z_]\w*(?:\[\])?)*"


class Recipe(NamedTuple):
    """A command's arguments, the jq filter after it, and the rest of the pipe."""

    arguments: str
    filter: str
    then: str


def recipes() -> list[Recipe]:
    found = []
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "services/cli").rglob("*.py")]:
        text = re.sub(r"\|\n\s+", "| ", path.read_text())
        for one in re.findall(r"postroad ([^|`\n]+)\| jq (?:-\w+ )?('[^']+'|[^\s|`)]+)(.*)", text):
            found.append(Recipe(one[0].strip(), one[1].strip("'"), one[2]))
        # The alerts: expressions over the output of `postroad lag`.
        found += [Recipe("lag -o json", one, "") for one in re.findall(r"`(\.\w+\[\][^`]*)`", text)]
    return found


RECIPES = recipes()


def printed(arguments: str, capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """Return the documents that a command with these arguments prints."""
    task = task_pb2.Task(id="019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071", timeline=[task_pb2.TimelineEntry()])
    out = Output(OutputFormat(re.findall(r"-o (\w+)", arguments)[0]))
    if arguments.startswith("dead list "):
        keys = (b"k" * 16, None)
        dead_letters = [
            parse_dead_letter(DeadLetterLocation("sender", 0, number), 0, key, [])
            for number, key in enumerate(keys)
        ]
        out.rows(
            [one.summary() for one in dead_letters]
            if "--each" in arguments
            else group_by_cause(dead_letters),
            (),
        )
    elif arguments.startswith("list "):
        out.rows([task_row(task)], ())
    elif arguments.startswith("get "):
        out.one(full_row(task))
    elif arguments.startswith("create "):
        out.one(task_row(task))
    elif arguments.startswith("watch "):
        change = pb.WatchResponse(task=task, change=task.timeline[0])
        out.row_writer(())(watching._row(change))
    elif arguments.startswith("lag "):
        sample = LagSample(
            0.0, {}, {}, {"sender": StageGroup("postroad.sender", "stable", [])}, {"sender": {}}
        )
        out.one(report({"sender": []}, sample, None, partitions=False))
    text = capsys.readouterr().out
    return [json.loads(part) for part in ([text] if out.format is OutputFormat.JSON else text.splitlines())]


def at(values: list[Any], path: str) -> list[Any]:
    """Return the values at a path such as `.stages[].lag`. Raises LookupError or TypeError for none."""
    for part in re.findall(r"\w+|\[\]", path):
        if part == "[]":
            values = [one for value in values for one in value]
        else:
            values = [None if value is None else value[part] for value in values]
    return values


def test_the_documents_have_recipes() -> None:
    assert len(RECIPES) > 10


@pytest.mark.parametrize("recipe", RECIPES, ids=" | ".join)
def test_a_filter_finds_what_it_reads(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    values = printed(recipe.arguments, capsys)
    for step in recipe.filter.split(" | "):
        paths = re.findall(PATH, re.sub(r'"[^"]*"', "", step))
        assert paths
        found = [at(values, path) for path in paths]
        if re.fullmatch(PATH, step.removesuffix(" // empty")):
            values = [value for value in found[0] if value is not None or "empty" not in step]
    if recipe.then.endswith(" -"):
        assert None not in values, "jq writes it as null"


@pytest.mark.parametrize("recipe", RECIPES, ids=" | ".join)
def test_a_filter_leaves_out_no_task(recipe: Recipe) -> None:
    if recipe.arguments.startswith("list "):
        assert "--all" in recipe.arguments, "it reads the newest 50"
    # "12:00:00.5Z" comes before "12:00:00Z".
    assert 'Z"' not in recipe.filter, "a time is compared as text"
