"""What Postroad does with the machine: `python -m tests.bench SCENARIO [--json FILE]`.

docs/performance.md says what each scenario measures. A run starts servers of its own. It ends with code 1
when a task was lost, a mail was sent twice, or a limit of the scenario does not hold.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from services.common.stages import STAGES
from tests.bench import backlog, idle, limit, options, stage, throughput
from tests.bench.counts import WrongCountsError

__all__ = ["main", "parser"]

# Programs with a command line of their own.
PROGRAMS = {
    "deferred": "what a hundred thousand waiting deferred tasks cost the sender and Kafka",
    "rebuild": "how long a rebuild takes",
    "smtp_speed": "what the sender's SMTP client costs alone",
    "soak": "an hour at a steady rate: memory, losses, copies",
    "watch": "what Watch costs, and its delay",
}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    scenarios = made.add_subparsers(dest="scenario", required=True, metavar="SCENARIO")
    for name, text, receiver in (
        ("pipeline", "64 callers, batches of 500 and a steady 200 a second, one after another", "both"),
        ("unary", "Creates as fast as 64 and 256 callers can", "both"),
        ("batch", "BatchCreates of 500 as fast as 4 callers can", "both"),
        ("steady", "Creates at a steady rate: CPU a task, latency from Create to acceptance", "sink"),
    ):
        one = scenarios.add_parser(name, help=text, description=text)
        options.add_servers(one)
        options.add_diagnosis(one)
        one.add_argument("--rounds", type=int, default=1, help="rounds, each on a fresh installation (1)")
        one.add_argument("--receiver", choices=("sink", "catcher", "both"), default=receiver)
        one.add_argument("--other", metavar="CLONE", help="another clone, whose services take turns")
        one.add_argument("--api", type=int, default=1, metavar="N", help="replicas of the api (1)")
        one.add_argument("--tasks", type=int, default=20_000, help="tasks of a load without a rate (20,000)")
        some = name == "pipeline"
        if some or name == "unary":
            callers = [64] if some else [64, 256]
            one.add_argument("--callers", type=options.whole_numbers, default=callers, metavar="N,...")
        if some or name == "batch":
            one.add_argument("--size", type=int, default=500, help="tasks in a BatchCreate (500)")
        if some or name == "steady":
            rates = [200.0] if some else [50.0, 200.0, 1000.0]
            one.add_argument("--rates", type=options.numbers, default=rates, metavar="N,...")
            one.add_argument("--seconds", type=float, default=10)
    _add_others(scenarios)
    for name, text in PROGRAMS.items():
        scenarios.add_parser(name, help=text, add_help=False)
    return made


def _add_others(scenarios: Any) -> None:
    def add(name: str, text: str, *, warm_up: int = 40_000) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = scenarios.add_parser(name, help=text, description=text)
        options.add_servers(one, warm_up=warm_up)
        return one

    one = add("stage", "one stage alone on a prepared topic")
    one.add_argument("name", choices=tuple(STAGES))
    one.add_argument("--tasks", type=int, default=40_000)
    one.add_argument("--rounds", type=int, default=1)
    one = add("replicas", "each stage with 1, 2 and 3 replicas; the receiver takes 50 ms a mail")
    one.add_argument("--stages", type=options.services, default=["api", *STAGES], metavar="NAME,...")
    one.add_argument("--replicas", type=options.whole_numbers, default=[1, 2, 3], metavar="N,...")
    one.add_argument("--tasks", type=int, default=20_000)
    one.add_argument("--milliseconds", type=int, default=50, help="the time of a mail at the receiver (50)")
    one = add("backlog", "200,000 waiting tasks: memory of each service", warm_up=0)
    one.add_argument("--tasks", type=int, default=200_000)
    one.add_argument("--megabytes", type=float, default=200, help="the most that a service may have (200)")
    one = add("idle", "the CPU of all services without load", warm_up=0)
    one.add_argument("--seconds", type=float, default=30)
    one.add_argument("--percent", type=float, default=4, help="the services stay below this of a core (4)")
    one = add("limit", "beside a bare sketch of the pipeline, in turn")
    one.set_defaults(database="mariadb")
    one.add_argument("folder", type=Path, help="the folder of the sketch")
    one.add_argument(
        "--cases", type=lambda text: text.split(","), default=list(limit.CASES), metavar="NAME,..."
    )
    one.add_argument("--rounds", type=int, default=5)


# By scenario, what runs it.
RUN: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    **{name: partial(throughput.run, name) for name in ("pipeline", "unary", "batch", "steady")},
    "stage": stage.run,
    "replicas": stage.run_replicas,
    "backlog": backlog.run,
    "idle": idle.run,
    "limit": limit.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one scenario (`pipeline` if none is named). Return 0, or 1 with the cause on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    given, rest = parser().parse_known_args(words or ["pipeline"])
    if given.scenario in PROGRAMS:
        sys.argv = [f"tests.bench {given.scenario}", *rest]
        return int(importlib.import_module(f"tests.bench.{given.scenario}").main() or 0)
    if rest:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        found = RUN[given.scenario](given)
    except (WrongCountsError, RuntimeError) as error:
        print(f"tests.bench: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    # What ends this program ends its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    sys.exit(main())
