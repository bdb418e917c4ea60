"""The runbook is true: its commands, metrics, settings and links exist."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client import REGISTRY

from deploy.local.database_users import USERS
from services.cli.main import app
from services.validator import mx

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "operations.md").read_text()


def _commands() -> list[str]:
    """Return each `postroad ...` of the text, from code blocks and from the prose."""
    blocks = [line.strip() for line in re.findall(r"^ {4,}(.+)$", TEXT, re.MULTILINE)]
    inline = re.findall(r"`([^`\n]+)`", TEXT)
    found = []
    for line in [*blocks, *inline]:
        for part in re.split(r"\s\|\s?|\s#\s", line):
            bare = re.sub(r"^(?:[A-Z_]+=\S+ )*", "", part.strip())
            # Reading --install-completion already does it, to the shell of whoever runs the tests.
            if bare.startswith("postroad ") and not {"COMMAND", "--install-completion"} & set(bare.split()):
                found.append(bare.removesuffix("...").strip())
    return sorted(set(found))


COMMANDS = _commands()


def test_there_are_many() -> None:
    assert len(COMMANDS) > 35


def test_no_recipe_uses_xargs() -> None:
    """xargs turns every exit code into 123, and runs the command even without a task."""
    assert "xargs postroad" not in TEXT


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_runbook_exists(line: str) -> None:
    """The command line parses it, down to its last flag, without running it."""
    command: Any = typer.main.get_command(app)
    context, arguments = None, shlex.split(line)[1:]
    while True:
        context = command.make_context(command.name, list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        _, command, arguments = command.resolve_command(context, rest)


def test_every_metric_of_the_runbook_exists() -> None:
    for path in DOCS.parent.glob("services/**/metrics.py"):
        import_module(".".join(path.relative_to(DOCS.parent).with_suffix("").parts))
    known = {name for name in REGISTRY._names_to_collectors if name.startswith("postroad_")}
    named = set(re.findall(r"\bpostroad_\w+", TEXT)) - {f"postroad_{user}" for user in USERS}
    assert named
    assert named <= known


def test_every_setting_of_the_runbook_exists() -> None:
    from services.cli.settings import VARIABLES
    from services.common.config import variables
    from services.common.environment import OTHERS

    known = set(variables())
    named = set(re.findall(r"\b(?:POSTROAD|EMAIL)_[A-Z_]+\b", TEXT))
    assert named <= known | set(VARIABLES.values()) | OTHERS


def test_every_link_has_a_target() -> None:
    headings = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target[1:] in anchors if target.startswith("#") else (DOCS / target).exists(), target


def test_the_bounds_of_what_is_believed_of_the_dns_are_the_validators() -> None:
    text = " ".join(TEXT.split())
    (low, high), (negative_low, negative_high) = mx._OK_TTL, mx._NEGATIVE_TTL
    assert f"for {low} s at least and {high} s at most" in text
    assert f"for {negative_low} to {negative_high} s, as its SOA says, and for {mx._UNPROVEN_TTL} s" in text
