"""`postroad replay`."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from services.cli.completion import among, reopenable, statuses, topics
from services.cli.errors import FAILED, INTERRUPTED, NOT_FOUND, USAGE, Failure
from services.cli.frame import DATABASE, KAFKA, Frame, Yes, command
from services.cli.replay_results import produced, refused, result, show, told
from services.cli.terminal import Bar, confirm, progress, say

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from services.cli.replay.asked import Asked
    from services.cli.replay.records import Read
    from services.cli.replay.store import Replay
    from services.common.config import Settings

__all__ = ["register"]

_PANEL = "Which tasks"
_MARK = "(try 'postroad replay --help')"


def _many(flag: str, text: str, metavar: str, panel: str | None = _PANEL, words: Any = None) -> Any:
    return typer.Option(
        flag,
        help=text,
        metavar=metavar,
        rich_help_panel=panel,
        show_default=False,
        autocompletion=words and among(words),
    )


Many: TypeAlias = list[str] | None


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
        frame: Frame,
        *,
        topic: Annotated[
            str,
            typer.Argument(
                help="task.created, mx.ok, ..., or a delay topic.",
                show_default=False,
                autocompletion=among(topics),
            ),
        ] = "",
        from_: Annotated[
            str, typer.Option("--from", help="start, an offset, or a time.", metavar="POINT")
        ] = "start",
        to: Annotated[str, typer.Option("--to", help="end, an offset, or a time.", metavar="POINT")] = "end",
        status: Annotated[
            Many, _many("--status", "Tasks of this status; several: of any.", "STATUS", words=statuses)
        ] = None,
        reason: Annotated[Many, _many("--reason", "Tasks of this reason.", "CODE")] = None,
        recipient: Annotated[Many, _many("--recipient", "Tasks to this recipient.", "ADDRESS")] = None,
        domain: Annotated[Many, _many("--domain", "Tasks to recipients of this domain.", "NAME")] = None,
        id_: Annotated[Many, _many("--id", "This task.", "ID")] = None,
        label: Annotated[
            Many, _many("--label", "Tasks with this label; several: with all.", "KEY=VALUE")
        ] = None,
        reopen: Annotated[
            Many,
            _many(
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
        its status. What still works is only reminded: nothing is sent twice. It reads up to the end that the
        topic has when it begins, shows what would become of the records, asks (--yes: neither), and produces
        at a bounded rate.

        A record that cannot be produced is told and counted as refused, and the exit code is 1 at the end.
        Ctrl-C stops it where it stands (exit code 130); --resume goes on from there, also after a crash.
        """
        from services.cli.replay.asked import Asked  # noqa: PLC0415

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
            raise Failure(f"--resume goes on with what was asked for; only --rate may change {_MARK}", USAGE)
        if not resume and not topic:
            raise Failure(f"which TOPIC? {_MARK}", USAGE)
        settings = frame.settings()
        with _engine(settings) as engine:
            if resume:
                _go_on(frame, settings, engine, resume, rate)
                return
            asked = Asked(
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
            _begin(frame, settings, engine, asked, dry_run=dry_run, yes=yes)


def _begin(
    frame: Frame, settings: Settings, engine: Engine, asked: Asked, *, dry_run: bool, yes: bool
) -> None:
    from services.cli.replay.asked import checked  # noqa: PLC0415
    from services.cli.replay.run import survey  # noqa: PLC0415
    from services.cli.replay.source import spans  # noqa: PLC0415
    from services.cli.replay.span import parse_point  # noqa: PLC0415
    from services.cli.replay.store import Replay, create, new_id  # noqa: PLC0415

    try:
        asked = checked(asked)
    except ValueError as error:
        raise Failure(error, USAGE) from None
    now = datetime.now(UTC)
    start, end = (parse_point(f, t, now) for f, t in (("--from", asked.start), ("--to", asked.end)))
    todo = spans(settings, asked.topic, start, end)
    if dry_run or not yes:
        total = sum(span.left for span in todo.values())
        with progress("looking", total) as bar:
            counts, tasks = survey(settings, engine, asked, todo, _ticks(bar, total))
        if dry_run:
            result(frame.out, None, counts, "dry run", tasks)
            return
        show(counts, tasks)
        if not produced(counts):
            say("None of these records would be produced.")
            if not frame.out.is_table:
                result(frame.out, None, counts, "nothing to do", tasks)
            return
        confirm(f"Produce {told(counts, tasks)} to {asked.topic} at {asked.rate:g}/s?", yes)
    replay = Replay(new_id(now), asked.topic, asked.arguments(), time.time_ns() // 1_000_000, todo)
    create(engine, replay)
    say(f"Replay {replay.id} begins.")
    _run(frame, settings, engine, replay)


def _go_on(frame: Frame, settings: Settings, engine: Engine, id_: str, rate: float | None) -> None:
    from services.cli.replay.asked import check_rate  # noqa: PLC0415
    from services.cli.replay.store import load, unfinished  # noqa: PLC0415

    replay = load(engine, id_)
    if replay is None:
        open_ = ", ".join(unfinished(engine)) or "none"
        raise Failure(f"there is no replay {id_}; those that are not at their end: {open_}", NOT_FOUND)
    if replay.finished:
        say(f"Replay {id_} is at its end.")
        _finished(frame, replay)
        return
    if rate is not None:
        try:
            check_rate(rate)
        except ValueError as error:
            raise Failure(error, USAGE) from None
        replay.arguments = {**replay.arguments, "rate": rate}
    _run(frame, settings, engine, replay)


def _run(frame: Frame, settings: Settings, engine: Engine, replay: Replay) -> None:
    from services.cli.replay.run import Superseded, run  # noqa: PLC0415

    total = replay.left
    try:
        with _stopped_by_signals() as stop, progress(f"replay {replay.topic}", total) as bar:
            finished = run(settings, engine, replay, stop, _ticks(bar, total), refused=_say_refused)
    except Superseded as error:
        raise Failure(error, FAILED) from None
    except BaseException:
        say(f"Replay {replay.id} was cut off. Go on with: postroad replay --resume {replay.id}")
        raise
    if finished:
        _finished(frame, replay)
    else:
        result(frame.out, replay.id, replay.counts, "stopped")
        line = (
            f"interrupted with {replay.left} records left; go on with: postroad replay --resume {replay.id}"
        )
        raise Failure(line, INTERRUPTED)


def _finished(frame: Frame, replay: Replay) -> None:
    result(frame.out, replay.id, replay.counts, "finished")
    number = refused(replay.counts)
    if number:
        raise Failure(f"{number} record{'s' if number > 1 else ''} could not be produced", FAILED)


def _say_refused(record: Read, why: str) -> None:
    say(f"{record.topic}/{record.partition}/{record.offset} was not produced: {why}")


@contextmanager
def _engine(settings: Settings) -> Iterator[Engine]:
    from services.cli.database import url_of  # noqa: PLC0415
    from services.common.database.engine import make_engine  # noqa: PLC0415

    engine = make_engine(url_of(settings), pool_size=1)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM sets the event; the second ends the command as it would have."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def asked_to_stop(_number: int, _frame: object) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, asked_to_stop)
    try:
        yield stop
    finally:
        restore()


def _ticks(bar: Bar, total: int) -> Any:
    left = total

    def tick(now_left: int) -> None:
        nonlocal left
        bar.advance(left - now_left)
        left = now_left

    return tick
