"""`postroad dead list|show|replay|purge`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.command import KAFKA, CommandContext, Yes, command
from services.cli.completion import complete_from, stages
from services.cli.errors import FAILED, NOT_FOUND, USAGE, Failure
from services.cli.output import Column, OutputRow, one_line, safe_text
from services.cli.terminal import confirm, progress, say

if TYPE_CHECKING:
    from services.common.operations.dead_letters.dead_letter import DeadLetter

__all__ = ["register"]

_GROUPS = (
    Column("stage"),
    Column("count", align_right=True),
    Column("first", rank=2),
    Column("last", rank=1),
    Column("sample"),
    Column("cause", min_width=20),
)
_DEAD_LETTERS = (
    Column("letter"),
    Column("time", rank=1),
    Column("origin", rank=2),
    Column("task", rank=3),
    Column("cause", min_width=20),
)
_NONE = "There are no dead letters."

Locations = Annotated[
    list[str] | None, typer.Argument(metavar="STAGE/PARTITION/OFFSET", help="Dead letters.")
]
OneStage = Annotated[
    str | None,
    typer.Option(
        "--stage", help="Those of this stage.", metavar="STAGE", autocompletion=complete_from(stages)
    ),
]
Cause = Annotated[str, typer.Option("--cause", help="Those whose cause contains this text.", metavar="TEXT")]
All = Annotated[bool, typer.Option("--all", help="All dead letters of all stages.")]


def register(app: typer.Typer) -> None:
    """Add the group `dead` to the app."""
    dead = typer.Typer(no_args_is_help=True, help="The dead letters: records that a stage could not handle.")
    app.add_typer(dead, name="dead")
    _register_list(dead)
    _register_show(dead)
    _register_replay(dead)
    _register_purge(dead)


def _register_list(dead: typer.Typer) -> None:
    @command(
        dead,
        "list",
        uses=(KAFKA,),
        examples="""
            postroad dead list
            postroad dead list --stage sender --each
            postroad dead list -o jsonl --each
        """,
    )
    def list_(
        context: CommandContext,
        stage: OneStage = None,
        cause: Cause = "",
        each: Annotated[bool, typer.Option("--each", help="Every dead letter, not only how many.")] = False,
    ) -> None:
        """Show the dead letters by stage and cause. Those that were replayed or purged are not shown."""
        from services.common.operations.dead_letters.dead_letter import group_by_cause  # noqa: PLC0415

        found = _find(context, None, stage, cause)
        if each:
            context.out.rows([one.summary() for one in found], _DEAD_LETTERS, _NONE)
        else:
            context.out.rows(group_by_cause(found), _GROUPS, _NONE)


def _register_show(dead: typer.Typer) -> None:
    @command(dead, "show", uses=(KAFKA,), examples="postroad dead show sender/3/17")
    def show(
        context: CommandContext,
        location: Annotated[str, typer.Argument(metavar="STAGE/PARTITION/OFFSET", help="The dead letter.")],
    ) -> None:
        """Show a dead letter: its cause, its origin, and the record itself, decoded."""
        from services.common.operations.dead_letters.dead_letter import describe  # noqa: PLC0415
        from services.common.operations.dead_letters.reader import read_records  # noqa: PLC0415

        [dead_letter] = _find(context, [location], None, "")
        found = next(read_records(context.settings(), [dead_letter.location]), None)
        if found is None:
            raise Failure(f"no dead letter {location}", NOT_FOUND)
        context.out.one(describe(*found), lambda row: _show_details(context, row))


def _register_replay(dead: typer.Typer) -> None:
    @command(
        dead,
        "replay",
        uses=(KAFKA,),
        examples="""
            postroad dead replay sender/3/17
            postroad dead replay --stage validator --cause "KeyError" --yes
        """,
    )
    def replay(
        context: CommandContext,
        locations: Locations = None,
        *,
        stage: OneStage = None,
        cause: Cause = "",
        all_: All = False,
        yes: Yes = False,
    ) -> None:
        """Send dead letters back to the topics that they came from, once the fault is mended.

        Every stage that reads the topic sees the record again; a mail that went out is not sent again. A
        record that failed at a later attempt comes back to its stage alone, as that attempt. A value that did
        not fit into its dead letter is read at its origin, while that topic keeps it. The exit code is 1
        where a dead letter stays.
        """
        from services.common.operations.dead_letters.redrive import can_redrive, redrive  # noqa: PLC0415

        chosen = _choose(context, locations, stage, cause, all_)
        possible = [one for one in chosen if can_redrive(one)]
        if len(possible) < len(chosen):
            number = len(chosen) - len(possible)
            say(f"{number} dead letters do not say which event topic they came from; they stay.")
        if not possible:
            raise Failure("none of these dead letters can be replayed", FAILED)
        _ask("Replay", possible, yes)
        kept: list[str] = []
        try:
            with progress("replay", len(possible)) as bar:
                done = redrive(context.settings(), possible, bar.advance, kept.append)
        finally:
            for why in kept:
                say(f"{why}; it stays.")
        if len(kept) == len(possible):
            raise Failure("none of these dead letters can be replayed", FAILED)
        staying = len(chosen) - len(possible) + len(kept)
        context.out.one({"replayed": done, "kept": staying})
        if staying:
            raise typer.Exit(FAILED)


def _register_purge(dead: typer.Typer) -> None:
    @command(
        dead,
        "purge",
        uses=(KAFKA,),
        examples="""
            postroad dead purge sender/3/17
            postroad dead purge --stage status --cause "not a TaskCreated" --yes
        """,
    )
    def purge(
        context: CommandContext,
        locations: Locations = None,
        *,
        stage: OneStage = None,
        cause: Cause = "",
        all_: All = False,
        yes: Yes = False,
    ) -> None:
        """Do away with dead letters. The records themselves stay on the topics that they came from."""
        from services.common.operations.dead_letters import redrive  # noqa: PLC0415

        chosen = _choose(context, locations, stage, cause, all_)
        _ask("Purge", chosen, yes)
        with progress("purge", len(chosen)) as bar:
            done = redrive.purge(context.settings(), chosen, bar.advance)
        context.out.one({"purged": done})


def _choose(
    context: CommandContext, locations: list[str] | None, stage: str | None, cause: str, all_: bool
) -> list[DeadLetter]:
    if not (locations or stage or cause or all_):
        raise Failure("name the dead letters, or say --stage, --cause or --all", USAGE)
    if all_ and (locations or stage or cause):
        raise Failure("--all means all dead letters; it goes with nothing else", USAGE)
    found = _find(context, locations, stage, cause)
    if not found:
        raise Failure("there are no such dead letters", NOT_FOUND)
    return found


def _find(
    context: CommandContext, locations: list[str] | None, stage: str | None, cause: str
) -> list[DeadLetter]:
    from services.common.operations.dead_letters.dead_letter import parse_location  # noqa: PLC0415
    from services.common.operations.dead_letters.reader import find_dead_letters  # noqa: PLC0415
    from services.common.operations.errors import InvalidOption  # noqa: PLC0415

    try:
        wanted = {parse_location(text) for text in locations or ()}
    except ValueError as error:
        raise Failure(error, USAGE) from None
    try:
        return find_dead_letters(context.settings(), wanted, stage, cause)
    except InvalidOption as error:
        # A location may name the unknown stage, not --stage.
        raise Failure(error.problem, USAGE) from None


def _ask(what: str, dead_letters: list[DeadLetter], yes: bool) -> None:
    from services.common.operations.dead_letters.dead_letter import group_by_cause  # noqa: PLC0415

    if not yes:
        for row in group_by_cause(dead_letters):
            say(f"{row['count']:>8} of {row['stage']}: {one_line(row['cause'])[:80]}")
    confirm(f"{what} {len(dead_letters)} dead letter{'s' if len(dead_letters) > 1 else ''}?", yes)


def _show_details(context: CommandContext, row: OutputRow) -> None:
    apart = ("headers", "event", "value", "left_out")
    context.out.values({key: value for key, value in row.items() if key not in apart})
    for part in row["left_out"] or ():
        print(f"\nleft out: the {part['part']}, {part['size']} bytes, SHA-256 {part['sha256']}")
    for title, value in (("headers", row["headers"]), ("event", row["event"])):
        if value:
            # JSON escapes some control characters, but none from 0x7f on.
            print(f"\n{title}\n{safe_text(json.dumps(value, ensure_ascii=False, indent=2))}")
    if row["value"] is not None:
        print(f"\nvalue\n{row['value']}")
