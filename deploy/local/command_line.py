"""The commands of `python3 -m deploy.local`."""

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from deploy.local.commands import SetupError
from deploy.local.layout import Layout
from deploy.local.process import log_tail
from deploy.local.stack import Stack, StackError
from deploy.local.state import SERVICES
from services.common.stages import STAGES

__all__ = ["main"]

# How much of each log `logs` prints without a name: enough to see what a process does now.
LINES = 10


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count <= 64:
        raise argparse.ArgumentTypeError("0 to 64")
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m deploy.local",
        description="The whole system as processes of this user, under .local/ (or POSTROAD_LOCAL_DIR).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start what does not run; returns when all is ready")
    for service in SERVICES:
        up.add_argument(f"--{service}", type=_count, metavar="N", help=f"replicas of {service}")
    up.add_argument("--kafka-nodes", type=int, choices=(1, 3), help="Kafka nodes (1)")
    up.add_argument("--infra-only", action="store_true", help="Kafka, MySQL, DNS and the catcher only")
    up.add_argument("--secure", action="store_true", help="TLS and least rights in Kafka and MySQL")
    scale = commands.add_parser("scale", help="have N replicas of a service")
    scale.add_argument("service", choices=SERVICES)
    scale.add_argument("count", type=_count, metavar="N")
    start = commands.add_parser("start", help="start processes; returns when they are ready")
    start.add_argument("names", metavar="NAME", nargs="+")
    for name, text in (
        ("stop", "end one process by SIGTERM"),
        ("kill", "end one process by SIGKILL"),
    ):
        commands.add_parser(name, help=text).add_argument("name", metavar="NAME")
    logs = commands.add_parser("logs", help="print what one process wrote; without NAME, the end of each log")
    logs.add_argument("name", metavar="NAME", nargs="?")
    commands.add_parser("status", help="what runs, where, and how it is")
    down = commands.add_parser("down", help="end all that runs")
    down.add_argument("--wipe", action="store_true", help="delete the data too")
    return parser


def _show(stack: Stack) -> int:
    table = Table(box=None, pad_edge=False)
    for column in ("name", "pid", "state", "ready", "address"):
        table.add_column(column)
    table.add_column("memory", justify="right")
    rows = stack.processes()
    for row in rows:
        state = "running" if row.pid else "down"
        memory = f"{row.memory / 2**20:.0f} MB" if row.pid else ""
        table.add_row(row.name, str(row.pid or ""), state, "yes" if row.ready else "no", row.address, memory)
    # A pipe has no width, and rich would cut the rows at 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0 if rows and all(row.ready for row in rows) else 1


def _logs(layout: Layout, name: str | None) -> int:
    names = layout.names_in("logs", ".log")
    if name is None:
        for each in names:
            print(f"==> {each} <==", log_tail(layout, each, LINES), sep="\n")
        return 0
    try:
        sys.stdout.write(layout.log(name).read_text(errors="replace"))
    except FileNotFoundError:
        there = ", ".join(names) or "none"
        raise StackError(f"no log of {name}; there are {there}") from None
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _run(arguments: argparse.Namespace, stack: Stack) -> int:
    command = arguments.command
    began = time.monotonic()
    if command == "up":
        replicas = {s: getattr(arguments, s) for s in SERVICES if getattr(arguments, s) is not None}
        stack.up(
            replicas,
            arguments.kafka_nodes,
            services=not arguments.infra_only,
            secure=arguments.secure,
        )
        print(f"up in {time.monotonic() - began:.1f} s; settings: {stack.layout.env}", file=sys.stderr)
        if not arguments.infra_only and (line := stack.api_elsewhere()):
            _say(line)
    elif command == "scale":
        stack.scale(arguments.service, arguments.count)
        names = stack.state.replica_names(arguments.service)
        _say(f"{arguments.service}: {', '.join(names) or 'no replica'}")
        if arguments.service in STAGES and len(names) > (partitions := stack.partitions()):
            _say(f"only {partitions} of them get partitions, since POSTROAD_PARTITIONS is {partitions}")
    elif command == "start":
        stack.start(*arguments.names)
        for name in arguments.names:
            _say(f"{name} is ready")
    elif command == "stop":
        if not stack.stop(arguments.name):
            raise StackError(f"{arguments.name} did not end in time and was killed")
        _say(f"{arguments.name} has ended; `start {arguments.name}` brings it back")
    elif command == "kill":
        stack.stop(arguments.name, kill=True)
        _say(f"{arguments.name} was killed; `start {arguments.name}` brings it back")
    elif command == "status":
        return _show(stack)
    elif command == "logs":
        return _logs(stack.layout, arguments.name)
    elif command == "down":
        stack.down(wipe=arguments.wipe)
        _say("down; all data is deleted" if arguments.wipe else "down; `up` goes on with its data")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return 0 on success, 1 with the cause on stderr, 2 for a wrong command line."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments, Stack(Layout.from_environment()))
    except (StackError, SetupError, ValueError) as error:
        print(f"deploy.local: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
