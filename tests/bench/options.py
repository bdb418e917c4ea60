"""The options that scenarios share."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from deploy.local.state import SERVICES
from tests.bench.diagnosis import Diagnosis

__all__ = ["add_diagnosis", "add_servers", "diagnosis", "numbers", "services", "settings", "whole_numbers"]


def numbers(text: str) -> list[float]:
    """Return the numbers of a comma-separated list. Raises ArgumentTypeError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 50,200") from None
    if min(found) <= 0:
        raise argparse.ArgumentTypeError("each number must be above 0")
    return found


def whole_numbers(text: str) -> list[int]:
    """Return the whole numbers of a comma-separated list. Raises ArgumentTypeError."""
    return [int(number) for number in numbers(text)]


def services(text: str) -> list[str]:
    """Return the services of a comma-separated list. Raises ArgumentTypeError."""
    found = text.split(",")
    if unknown := set(found) - set(SERVICES):
        raise argparse.ArgumentTypeError(f"no service: {', '.join(sorted(unknown))}")
    return found


def add_servers(parser: argparse.ArgumentParser, *, warm_up: int = 40_000) -> None:
    """Add what concerns the servers and the installations on them."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--database", choices=("mysql", "mariadb"), default="mysql")
    parser.add_argument(
        "--partitions", type=int, metavar="N", help="partitions of each topic, instead of the default"
    )
    parser.add_argument(
        "--warm-up", type=int, default=warm_up, metavar="TASKS", help="tasks that warm the servers up first"
    )


def add_diagnosis(parser: argparse.ArgumentParser) -> None:
    """Add what shows where the time goes."""
    parser.add_argument("--profile", default="", metavar="NAME", help="profile a replica, such as sender-1")
    parser.add_argument(
        "--profile-file", type=Path, metavar="FILE",
        help=".svg: flame graph, .json: speedscope, .txt: stacks; the load's name is added",
    )  # fmt: skip
    parser.add_argument(
        "--profile-options", type=shlex.split, default=[], metavar="OPTIONS",
        help="options of py-spy, such as '--gil --native'",
    )  # fmt: skip
    parser.add_argument("--statements", action="store_true", help="print the database's statement digests")
    parser.add_argument("--requests", action="store_true", help="print Kafka's requests by kind and client")


def diagnosis(given: argparse.Namespace) -> Diagnosis:
    """Return what these options ask to look at."""
    return Diagnosis(
        profile=given.profile,
        profile_file=given.profile_file,
        profile_options=tuple(given.profile_options),
        statements=given.statements,
        requests=given.requests,
    )


def settings(given: argparse.Namespace) -> dict[str, str]:
    """Return the variables of an installation that differ from the shipped ones, which is the partitions."""
    return {"POSTROAD_PARTITIONS": str(given.partitions)} if given.partitions else {}
