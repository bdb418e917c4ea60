"""`postroad replay`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from services.cli.command import DATABASE, KAFKA, CommandContext, Yes, command
from services.cli.completion import complete_from, reopenable, statuses, topics
from services.cli.errors import FAILED, INTERRUPTED, USAGE, Failure
from services.cli.replay_results import produced_text, show_counts, show_result
from services.cli.terminal import ProgressBar, confirm, progress, say, stopped_by_signals
from services.cli.times import parse_point

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from services.common.config import Settings
    from services.common.operations.replay.options import ReplayOptions
    from services.common.operations.replay.records import ReplayedRecord
    from services.common.operations.replay.store import Replay

__all__ = ["register"]

_PANEL = "Which tasks"
_SEE_HELP = "(try 'postroad replay --help')"


def _filter_option(flag: str, text: str, metavar: str, panel: str | None = _PANEL, words: Any = None) -> Any:
    return typer.Option(
        flag,
        help=text,
        metavar=metavar,
        rich_help_panel=panel,
        show_default=False,
        autocompletion=words and complete_from(words),
    )


Texts: TypeAlias = list[str] | None


def register(app: typer.Typer) -> None:
    """Add the command to the app."""

    @command(
        app,
        "replay",
        uses=(KAFKA, DATABASE),
        examples="""
            postroad replay task.created --dry-run
            postroad replay mx.ok --from -2h --domain slow.example --rate 50
            postroad replay task.created --status failed --reason rejected --reopen failed
            postroad replay --resume 20260131T120000-1a2b3c
        """,
    )
    def replay(
        context: CommandContext,
        *,
        topic: Annotated[
            str,
            typer.Argument(
                help="task.created, mx.ok, ..., or a delay topic.",
                show_default=False,
                autocompletion=complete_from(topics),
            ),
        ] = "",
        from_: Annotated[
            str, typer.Option("--from", help="start, an offset, or a time.", metavar="POINT")
        ] = "start",
        to: Annotated[str, typer.Option("--to", help="end, an offset, or a time.", metavar="POINT")] = "end",
        status: Annotated[
            Texts,
            _filter_option("--status", "Tasks of this status; several: of any.", "STATUS", words=statuses),
        ] = None,
        reason: Annotated[Texts, _filter_option("--reason", "Tasks of this reason.", "CODE")] = None,
        recipient: Annotated[
            Texts, _filter_option("--recipient", "Tasks to this recipient.", "ADDRESS")
        ] = None,
        domain: Annotated[
            Texts, _filter_option("--domain", "Tasks to recipients of this domain.", "NAME")
        ] = None,
        id_: Annotated[Texts, _filter_option("--id", "This task.", "ID")] = None,
        label: Annotated[
            Texts, _filter_option("--label", "Tasks with this label; several: with all.", "KEY=VALUE")
        ] = None,
        reopen: Annotated[
            Texts,
            _filter_option(
                "--reopen",
                "Send again what is failed, cancelled or uncertain; deferred: what waits goes now.",
                "STATUS",
                None,
                reopenable,
            ),
        ] = None,
        rate: Annotated[
            float | None, typer.Option(help="Records produced a second; 500 unless said otherwise.")
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Show what would become of each record, and end.")
        ] = False,
        yes: Yes = False,
        resume: Annotated[
            str, typer.Option(help="Go on with a replay that was cut off.", metavar="ID", show_default=False)
        ] = "",
    ) -> None:
        """Produce a topic's records to it again, while the services run.

        A task whose mail went out is left out, and so is one that ended in another way, unless --reopen names
        its status. A task that still works only gets its record once more: nothing is sent twice. The replay
        reads up to the topic's present end. It shows what would happen to the records and asks, unless --yes
        is given. Then it produces them at a bounded rate.

        A record that cannot be produced is named and counted as refused, and the exit code is 1 at the end.
        Ctrl-C stops the replay (exit code 130). --resume continues it, also after a crash.
        """
        from services.common.operations.replay.options import ReplayOptions  # noqa: PLC0415

        given = (
            from_ != "start",
            to != "end",
            status,
            reason,
            recipient,
            domain,
            id_,
            label,
            reopen,
            dry_run,
        )
        if resume and (topic or any(given)):
            raise Failure(
                f"--resume goes on with what was asked for; only --rate may change {_SEE_HELP}", USAGE
            )
        if not resume and not topic:
            raise Failure(f"which TOPIC? {_SEE_HELP}", USAGE)
        settings = context.settings()
        with _engine(settings) as engine:
            if resume:
                _resume(context, settings, engine, resume, rate)
                return
            options = ReplayOptions(
                topic=topic.removeprefix(settings.topic_prefix),
                start=from_,
                end=to,
                status=tuple(status or ()),
                reason=tuple(reason or ()),
                recipient=tuple(recipient or ()),
                domain=tuple(domain or ()),
                id=tuple(id_ or ()),
                label=tuple(label or ()),
                reopen=tuple(reopen or ()),
                rate=500.0 if rate is None else rate,
            )
            _begin(context, settings, engine, options, dry_run=dry_run, yes=yes)


def _begin(
    context: CommandContext,
    settings: Settings,
    engine: Engine,
    options: ReplayOptions,
    *,
    dry_run: bool,
    yes: bool,
) -> None:
    from services.common.operations.replay.options import check_options  # noqa: PLC0415
    from services.common.operations.replay.preview import preview  # noqa: PLC0415
    from services.common.operations.replay.records import offset_ranges  # noqa: PLC0415
    from services.common.operations.replay.store import begin_replay, count_produced  # noqa: PLC0415

    options = check_options(options)
    now = datetime.now(UTC)
    start, end = parse_point("--from", options.start, now), parse_point("--to", options.end, now)
    ranges = offset_ranges(settings, options.topic, start, end)
    if dry_run or not yes:
        total = sum(range_.left for range_ in ranges.values())
        with progress("looking", total) as bar:
            counts, tasks = preview(settings, engine, options, ranges, _on_progress(bar, total))
        if dry_run:
            show_result(context.out, None, counts, "dry run", tasks)
            return
        show_counts(counts, tasks)
        if not count_produced(counts):
            say("None of these records would be produced.")
            if not context.out.is_table:
                show_result(context.out, None, counts, "nothing to do", tasks)
            return
        records = produced_text(counts, tasks)
        confirm(f"Produce {records} to {options.topic} at {options.rate:g}/s?", yes)
    replay = begin_replay(engine, options, ranges, now)
    say(f"Replay {replay.id} begins.")
    _run(context, settings, engine, replay)


def _resume(
    context: CommandContext, settings: Settings, engine: Engine, id_: str, rate: float | None
) -> None:
    from services.common.operations.replay.options import check_rate  # noqa: PLC0415
    from services.common.operations.replay.store import find_replay  # noqa: PLC0415

    replay = find_replay(engine, id_)
    if replay.finished:
        say(f"Replay {id_} is at its end.")
        _finish(context, replay)
        return
    if rate is not None:
        check_rate(rate)
        replay.options = {**replay.options, "rate": rate}
    _run(context, settings, engine, replay)


def _run(context: CommandContext, settings: Settings, engine: Engine, replay: Replay) -> None:
    from services.common.operations.replay.run import ReplayTakenOver, run  # noqa: PLC0415

    total = replay.left
    try:
        with stopped_by_signals() as stop, progress(f"replay {replay.topic}", total) as bar:
            on_progress = _on_progress(bar, total)
            finished = run(settings, engine, replay, stop, on_progress, on_refused=_say_refused)
    except ReplayTakenOver:
        raise
    except BaseException:
        say(f"Replay {replay.id} was cut off. Go on with: postroad replay --resume {replay.id}")
        raise
    if finished:
        _finish(context, replay)
    else:
        show_result(context.out, replay.id, replay.counts, "stopped")
        line = (
            f"interrupted with {replay.left} records left; go on with: postroad replay --resume {replay.id}"
        )
        raise Failure(line, INTERRUPTED)


def _finish(context: CommandContext, replay: Replay) -> None:
    from services.common.operations.replay.store import count_refused  # noqa: PLC0415

    show_result(context.out, replay.id, replay.counts, "finished")
    number = count_refused(replay.counts)
    if number:
        raise Failure(f"{number} record{'s' if number > 1 else ''} could not be produced", FAILED)


def _say_refused(record: ReplayedRecord, why: str) -> None:
    say(f"{record.topic}/{record.partition}/{record.offset} was not produced: {why}")


@contextmanager
def _engine(settings: Settings) -> Iterator[Engine]:
    from services.common.database.engine import make_engine  # noqa: PLC0415
    from services.common.operations.database_url import database_url  # noqa: PLC0415

    engine = make_engine(database_url(settings), pool_size=1)
    try:
        yield engine
    finally:
        engine.dispose()


def _on_progress(bar: ProgressBar, total: int) -> Any:
    left = total

    def advance(now_left: int) -> None:
        nonlocal left
        bar.advance(left - now_left)
        left = now_left

    return advance
