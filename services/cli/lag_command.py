"""`postroad lag`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from services.cli.command import DATABASE, KAFKA, CommandContext, command
from services.cli.completion import complete_from, stages
from services.cli.errors import UNAVAILABLE, USAGE, Failure, explain
from services.cli.output import Column, OutputRow
from services.cli.terminal import OncePerChange, say
from services.cli.times import format_duration, format_time
from services.common.stages import STAGES

__all__ = ["register"]

EXAMPLES = """
    postroad lag
    postroad lag --watch
    postroad lag --stage sender --partitions
    postroad lag --stage sender --domains
    postroad lag -o json | jq '.stages[] | select(.lag > 1000)'
"""


def _one_of(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _known_stages(given: list[str] | None) -> list[str] | None:
    for name in given or ():
        if name not in STAGES:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(map(repr, STAGES))}.")
    return given


def _rate(value: Any) -> str:
    return "" if value is None else f"{value:g}"


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _due(value: Any) -> str:
    return f"overdue {format_duration(-value)}" if value is not None and value < 0 else format_duration(value)


_STAGES = (
    Column("stage"),
    Column("state"),
    Column("replicas", align_right=True),
    Column("owned", align_right=True, rank=3),
    Column("lag", align_right=True, format=_count),
    Column("oldest_waiting_seconds", "oldest", align_right=True, format=format_duration),
    Column("read_per_second", "read/s", align_right=True, rank=1, format=_rate),
    Column("arriving_per_second", "arriving/s", align_right=True, rank=2, format=_rate),
    Column("delayed", align_right=True, rank=4, format=_count),
)
_MEMBERS = (
    Column("stage"),
    Column("client", "replica", min_width=12, keep_end=True),
    Column("host", rank=2),
    Column("partitions", align_right=True, rank=1),
    Column("lag", align_right=True, format=_count),
    Column("member", min_width=12, rank=3),
)
_PARTITIONS = (
    Column("stage"),
    Column("topic"),
    Column("partition", "part", align_right=True),
    Column("lag", align_right=True, format=_count),
    Column("oldest_waiting_seconds", "oldest", align_right=True, format=format_duration),
    Column("client", "replica", min_width=12, rank=1, keep_end=True),
    Column("committed", align_right=True, rank=3),
    Column("end", align_right=True, rank=2),
    Column("host", rank=4),
)
_OUTBOX = (
    Column("table"),
    Column("due", align_right=True, format=_count),
    Column("oldest_due_seconds", "oldest", align_right=True, format=format_duration),
)
_DOMAINS = (
    Column("domain", min_width=12),
    Column("sending", align_right=True, format=_count),
    Column("waiting", align_right=True, format=_count),
    Column("finished", align_right=True, format=_count),
    Column("oldest_seconds", "oldest", align_right=True, format=format_duration),
)
_WORST = 10
_DELAYS = (
    Column("topic"),
    Column("waiting", align_right=True, format=_count),
    Column("read"),
    Column("next_due_in_seconds", "next due in", align_right=True, format=_due),
    Column("next_due_at", "at", rank=1, format=format_time),
)


def register(app: typer.Typer) -> None:
    """Add `lag` to the app."""

    @command(app, "lag", uses=(KAFKA, DATABASE), examples=EXAMPLES)
    def lag(
        context: CommandContext,
        *,
        stage: Annotated[
            list[str] | None,
            typer.Option(
                help=f"This stage only: {_one_of(STAGES)}; repeatable.",
                metavar="STAGE",
                callback=_known_stages,
                autocompletion=complete_from(stages),
                show_default=False,
            ),
        ] = None,
        partitions: Annotated[bool, typer.Option("--partitions", help="Show each partition too.")] = False,
        domains: Annotated[
            bool,
            typer.Option("--domains", help="Show whose mails the sender has claimed; with --stage sender."),
        ] = False,
        watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")] = False,
        interval: Annotated[
            float,
            typer.Option(
                min=0, help="Seconds over which rates are measured; 0: no rates.", metavar="SECONDS"
            ),
        ] = 2.0,
    ) -> None:
        """Show how far each stage is behind: who owns its partitions, what waits, how long, how fast it goes.

        LAG counts the records that a stage has not committed, OLDEST is how long the first of them has
        waited. Records on delay topics wait on purpose and are shown apart. A delay topic whose due time is
        long past, or that nobody reads, is a fault. Stages commit twice a second: an interval below 2 makes
        rates jump.

        --domains shows the ten recipients' domains (JSON: all) that occupy the senders most. It reads the
        first 1000 uncommitted records of each partition. SENDING counts mails that are sent or wait for a
        session. WAITING counts records that wait for their turn. FINISHED ones wait for the commit of one
        before them.

        Without --stage it asks the database for the outbox: how many events are due and not on their topic
        yet, and since when. While the api publishes, none is older than a few seconds.

        --watch says when Kafka does not answer, and continues when it answers again.
        """
        from services.common.operations.lag.monitor import LagMonitor  # noqa: PLC0415

        if domains and (stage or []) != ["sender"]:
            raise Failure("--domains is of the sender: it goes with --stage sender", USAGE)
        with LagMonitor(
            context.settings(), stage or list(STAGES), domains=domains, outbox=not stage
        ) as monitor:
            if interval:
                monitor.start()
            write = context.out.row_writer(())
            kafka_remarks, outbox_remarks = OncePerChange(), OncePerChange()
            while True:
                time.sleep(interval)
                try:
                    found = monitor.measure(partitions=partitions)
                except Exception as error:
                    failure = explain(error, context.settings().kafka_bootstrap)
                    if not watch or failure is None or failure.code != UNAVAILABLE:
                        raise
                    kafka_remarks.say(f"postroad: {failure.line}")
                    time.sleep(1)
                    continue
                kafka_remarks.forget()
                _say_outbox_error(monitor.outbox_error, outbox_remarks)
                if not watch:
                    context.out.one(found, lambda found: _show(context, found))
                    return
                if context.out.is_table:
                    _clear(found)
                    _show(context, found)
                else:
                    write(found)
                # Without an interval, only this pause separates two samples.
                time.sleep(0 if interval else 1)


def _say_outbox_error(error: Exception | None, remarks: OncePerChange) -> None:
    if error is None:
        remarks.forget()
        return
    failure = explain(error)
    if failure is None:
        raise error
    remarks.say(f"postroad: the outbox is not shown: {failure.line}")


def _clear(found: dict[str, Any]) -> None:
    if sys.stdout.isatty():
        print("\x1b[H\x1b[2J", end="")
    print(format_time(found["at"]))
    print()


def _show(context: CommandContext, found: OutputRow) -> None:
    from services.common.operations.lag.report import remarks  # noqa: PLC0415

    out = context.out
    stages = [
        row
        | {
            "replicas": len(row["members"]),
            "owned": f"{row['partitions'] - row['unowned']}/{row['partitions']}",
        }
        for row in found["stages"]
    ]
    out.table(stages, _STAGES)
    members = [{"stage": row["stage"]} | member for row in found["stages"] for member in row["members"]]
    waiting = [row for row in found["delays"] if row["waiting"]]
    outbox = found.get("outbox")
    for rows, columns in (
        ([{"table": "outbox"} | outbox] if outbox else (), _OUTBOX),
        (members, _MEMBERS),
        (found.get("domains", ())[:_WORST], _DOMAINS),
        (found.get("partitions", ()), _PARTITIONS),
        (waiting, _DELAYS),
    ):
        if rows:
            print()
            out.table(rows, columns)
    for line in remarks(found):
        say(line)
