"""`postroad lag`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from services.cli.completion import among, stages
from services.cli.errors import UNAVAILABLE, USAGE, Failure, explain
from services.cli.frame import DATABASE, KAFKA, Frame, command
from services.cli.output import Column, Row
from services.cli.terminal import OncePerChange, say
from services.cli.times import ago, short
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
    return f"overdue {ago(-value)}" if value is not None and value < 0 else ago(value)


_STAGES = (
    Column("stage"),
    Column("state"),
    Column("replicas", right=True),
    Column("owned", right=True, rank=3),
    Column("lag", right=True, cell=_count),
    Column("oldest_waiting_seconds", "oldest", right=True, cell=ago),
    Column("read_per_second", "read/s", right=True, rank=1, cell=_rate),
    Column("arriving_per_second", "arriving/s", right=True, rank=2, cell=_rate),
    Column("delayed", right=True, rank=4, cell=_count),
)
_MEMBERS = (
    Column("stage"),
    Column("client", "replica", least=12, tail=True),
    Column("host", rank=2),
    Column("partitions", right=True, rank=1),
    Column("lag", right=True, cell=_count),
    Column("member", least=12, rank=3),
)
_PARTITIONS = (
    Column("stage"),
    Column("topic"),
    Column("partition", "part", right=True),
    Column("lag", right=True, cell=_count),
    Column("oldest_waiting_seconds", "oldest", right=True, cell=ago),
    Column("client", "replica", least=12, rank=1, tail=True),
    Column("committed", right=True, rank=3),
    Column("end", right=True, rank=2),
    Column("host", rank=4),
)
_OUTBOX = (
    Column("table"),
    Column("due", right=True, cell=_count),
    Column("oldest_due_seconds", "oldest", right=True, cell=ago),
)
_DOMAINS = (
    Column("domain", least=12),
    Column("sending", right=True, cell=_count),
    Column("waiting", right=True, cell=_count),
    Column("finished", right=True, cell=_count),
    Column("oldest_seconds", "oldest", right=True, cell=ago),
)
_WORST = 10
_DELAYS = (
    Column("topic"),
    Column("waiting", right=True, cell=_count),
    Column("read"),
    Column("next_due_in_seconds", "next due in", right=True, cell=_due),
    Column("next_due_at", "at", rank=1, cell=short),
)


def register(app: typer.Typer) -> None:
    """Add `lag` to the app."""

    @command(app, "lag", uses=(KAFKA, DATABASE), examples=EXAMPLES)
    def lag(
        frame: Frame,
        *,
        stage: Annotated[
            list[str] | None,
            typer.Option(
                help=f"This stage only: {_one_of(STAGES)}; repeatable.",
                metavar="STAGE",
                callback=_known_stages,
                autocompletion=among(stages),
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

        Lag is what a stage has not committed, oldest how long its first record has waited. What lies on
        delay topics waits on purpose and is shown apart; one whose due time is long past, or that nobody
        reads, is a fault. Stages commit twice a second: an interval below 2 makes rates jump.

        --domains shows the ten recipients' domains (JSON: all) that hold most of the senders, by the first
        1000 records of each partition that are not committed: mails that are SENDING or wait for a session,
        records WAITING for their turn, and those FINISHED whose commit waits for one before them.

        Without --stage the database is asked for the outbox: how many events are due and not on their topic
        yet, and since when. While the api publishes, none is older than a few seconds.

        --watch says when Kafka does not answer, and goes on when it does again.
        """
        from services.common.operations.lag.monitor import LagMonitor  # noqa: PLC0415

        if domains and (stage or []) != ["sender"]:
            raise Failure("--domains is of the sender: it goes with --stage sender", USAGE)
        with LagMonitor(
            frame.settings(), stage or list(STAGES), domains=domains, outbox=not stage
        ) as monitor:
            if interval:
                monitor.start()
            write = frame.out.lines(())
            kafka_remarks, outbox_remarks = OncePerChange(), OncePerChange()
            while True:
                time.sleep(interval)
                try:
                    found = monitor.measure(partitions=partitions)
                except Exception as error:
                    failure = explain(error, frame.settings().kafka_bootstrap)
                    if not watch or failure is None or failure.code != UNAVAILABLE:
                        raise
                    kafka_remarks.say(f"postroad: {failure.line}")
                    time.sleep(1)
                    continue
                kafka_remarks.forget()
                _say_outbox_error(monitor.outbox_error, outbox_remarks)
                if not watch:
                    frame.out.one(found, lambda found: _show(frame, found))
                    return
                if frame.out.is_table:
                    _clear(found)
                    _show(frame, found)
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
    print(short(found["at"]))
    print()


def _show(frame: Frame, found: Row) -> None:
    from services.common.operations.lag.report import remarks  # noqa: PLC0415

    out = frame.out
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
