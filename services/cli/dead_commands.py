"""`postroad dead list|show|replay|purge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.completion import among, stages
from services.cli.errors import FAILED, NOT_FOUND, USAGE, Failure
from services.cli.frame import KAFKA, Frame, Yes, command
from services.cli.output import Column, Row, plain, safe_text
from services.cli.terminal import confirm, progress, say

if TYPE_CHECKING:
    from services.cli.dead.letter import Letter, Place

__all__ = ["register"]

_GROUPS = (
    Column("stage"),
    Column("count", right=True),
    Column("first", rank=2),
    Column("last", rank=1),
    Column("sample"),
    Column("cause", least=20),
)
_LETTERS = (
    Column("letter"),
    Column("time", rank=1),
    Column("origin", rank=2),
    Column("task", rank=3),
    Column("cause", least=20),
)

Places = Annotated[list[str] | None, typer.Argument(metavar="STAGE/PARTITION/OFFSET", help="Letters.")]
OneStage = Annotated[
    str | None,
    typer.Option("--stage", help="Those of this stage.", metavar="STAGE", autocompletion=among(stages)),
]
Cause = Annotated[str, typer.Option("--cause", help="Those whose cause contains this text.", metavar="TEXT")]
All = Annotated[bool, typer.Option("--all", help="All letters of all stages.")]


def register(app: typer.Typer) -> None:
    """Add the group `dead` to the app."""
    dead = typer.Typer(no_args_is_help=True, help="The dead letters: records that a stage could not handle.")
    app.add_typer(dead, name="dead")
    _list(dead)
    _show(dead)
    _replay(dead)
    _purge(dead)


def _list(dead: typer.Typer) -> None:
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
        frame: Frame,
        stage: OneStage = None,
        cause: Cause = "",
        each: Annotated[bool, typer.Option("--each", help="Every letter, not only how many.")] = False,
    ) -> None:
        """Show the dead letters by stage and cause. Those that were replayed or purged are not shown."""
        from services.cli.dead.pick import groups  # noqa: PLC0415

        letters, _ = _read(frame, None, stage, cause)
        if each:
            frame.out.rows(map(_row, letters), _LETTERS, "There are no dead letters.")
        else:
            frame.out.rows(groups(letters), _GROUPS, "There are no dead letters.")


def _show(dead: typer.Typer) -> None:
    @command(dead, "show", uses=(KAFKA,), examples="postroad dead show sender/3/17")
    def show(
        frame: Frame,
        letter: Annotated[str, typer.Argument(metavar="STAGE/PARTITION/OFFSET", help="The letter.")],
    ) -> None:
        """Show a dead letter: why it is there, where it came from, and the record itself, decoded."""
        from services.cli.dead.board import records  # noqa: PLC0415
        from services.cli.dead.letter import shown  # noqa: PLC0415

        letters, _ = _read(frame, [letter], None, "")
        found = next(records(frame.settings(), [letters[0].place]), None)
        if found is None:
            raise Failure(f"no dead letter {letter}", NOT_FOUND)
        frame.out.one(shown(found.letter, found.value, found.headers), lambda row: _letter(frame, row))


def _replay(dead: typer.Typer) -> None:
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
        frame: Frame,
        letters: Places = None,
        *,
        stage: OneStage = None,
        cause: Cause = "",
        all_: All = False,
        yes: Yes = False,
    ) -> None:
        """Send dead letters back to the topics that they came from, once what was wrong is mended.

        Every stage that reads the topic sees the record again; a mail that went out is not sent again. What
        died on a retry comes back to its stage alone, as that attempt. A value that did not fit into its
        letter is read where it came from, while that topic keeps it. The exit code is 1 where a letter stays.
        """
        from services.cli.dead import resolve  # noqa: PLC0415
        from services.cli.dead.back import replayable  # noqa: PLC0415

        meant, settings = _meant(frame, letters, stage, cause, all_)
        there = [letter for letter in meant if replayable(letter)]
        if len(there) < len(meant):
            say(f"{len(meant) - len(there)} letters do not say which event topic they came from; they stay.")
        if not there:
            raise Failure("none of these letters can be replayed", FAILED)
        _ask("Replay", there, yes)
        stay: list[str] = []
        try:
            with progress("replay", len(there)) as bar:
                done = resolve.replay(settings, there, bar.advance, stay.append)
        finally:
            for why in stay:
                say(f"{why}; it stays.")
        if len(stay) == len(there):
            raise Failure("none of these letters can be replayed", FAILED)
        kept = len(meant) - len(there) + len(stay)
        frame.out.one({"replayed": done, "kept": kept})
        if kept:
            raise typer.Exit(FAILED)


def _purge(dead: typer.Typer) -> None:
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
        frame: Frame,
        letters: Places = None,
        *,
        stage: OneStage = None,
        cause: Cause = "",
        all_: All = False,
        yes: Yes = False,
    ) -> None:
        """Do away with dead letters. The records themselves stay on the topics that they came from."""
        from services.cli.dead import resolve  # noqa: PLC0415

        meant, settings = _meant(frame, letters, stage, cause, all_)
        _ask("Purge", meant, yes)
        with progress("purge", len(meant)) as bar:
            done = resolve.purge(settings, meant, bar.advance)
        frame.out.one({"purged": done})


def _meant(
    frame: Frame, places: list[str] | None, stage: str | None, cause: str, all_: bool
) -> tuple[list[Letter], Any]:
    if not (places or stage or cause or all_):
        raise Failure("name the letters, or say --stage, --cause or --all", USAGE)
    if all_ and (places or stage or cause):
        raise Failure("--all means all letters; it goes with nothing else", USAGE)
    letters, settings = _read(frame, places, stage, cause)
    if not letters:
        raise Failure("there are no such dead letters", NOT_FOUND)
    return letters, settings


def _read(frame: Frame, places: list[str] | None, stage: str | None, cause: str) -> tuple[list[Letter], Any]:
    from services.cli.dead.board import read_board  # noqa: PLC0415
    from services.cli.dead.letter import parse_place  # noqa: PLC0415
    from services.cli.dead.pick import missing, picked  # noqa: PLC0415
    from services.common.stages import STAGES  # noqa: PLC0415

    try:
        wanted: set[Place] = {parse_place(text) for text in places or ()}
    except ValueError as error:
        raise Failure(error, USAGE) from None
    stages = {place.stage for place in wanted} if wanted else {stage} if stage else set(STAGES)
    unknown = (stages | ({stage} if stage else set())) - set(STAGES)
    if unknown:
        raise Failure(f"no stage {sorted(unknown)[0]!r}; there are {', '.join(STAGES)}", USAGE)
    settings = frame.settings()
    letters = picked(read_board(settings, sorted(stages)).letters.values(), wanted, cause)
    gone = missing(letters, wanted)
    if gone:
        raise Failure(f"no dead letter {', '.join(map(str, gone))}", NOT_FOUND)
    return [letter for letter in letters if stage is None or letter.place.stage == stage], settings


def _ask(what: str, letters: list[Letter], yes: bool) -> None:
    from services.cli.dead.pick import groups  # noqa: PLC0415

    if not yes:
        for row in groups(letters):
            say(f"{row['count']:>8} of {row['stage']}: {plain(row['cause'])[:80]}")
    confirm(f"{what} {len(letters)} dead letter{'s' if len(letters) > 1 else ''}?", yes)


def _row(letter: Letter) -> dict[str, Any]:
    return {
        "letter": str(letter.place),
        "time": letter.time,
        "origin": str(letter.origin) if letter.origin else None,
        "attempt": letter.attempt or None,
        "task": letter.task or None,
        "cause": letter.cause,
    }


def _letter(frame: Frame, row: Row) -> None:
    import json  # noqa: PLC0415

    apart = ("headers", "event", "value", "left_out")
    frame.out.values({key: value for key, value in row.items() if key not in apart})
    for part in row["left_out"] or ():
        print(f"\nleft out: the {part['part']}, {part['size']} bytes, SHA-256 {part['sha256']}")
    for title, value in (("headers", row["headers"]), ("event", row["event"])):
        if value:
            # JSON escapes some control characters, not those from 0x7f on.
            print(f"\n{title}\n{safe_text(json.dumps(value, ensure_ascii=False, indent=2))}")
    if row["value"] is not None:
        print(f"\nvalue\n{row['value']}")
