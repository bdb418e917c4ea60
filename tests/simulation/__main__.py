"""`python -m tests.simulation [--schedules N | --seconds S] [--seed N] [--mutant NAME] [--plan JSON]`"""

from __future__ import annotations

import argparse
import shlex
import sys

from tests.simulation import mutants
from tests.simulation.explore import Failure, Report, explore, prepared, shrink, try_plan
from tests.simulation.plan import Plan, dump, load, make


def main() -> int:
    """Explore schedules, or run one plan. Return 0 without violations; for a mutant, with some."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, help="how many (20000 without --seconds)")
    parser.add_argument("--seconds", type=float, help="for how long")
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule; the others follow it")
    parser.add_argument(
        "--mutant",
        choices=sorted(mutants.MUTANTS),
        help="break the code in this way; a schedule must find it",
    )
    parser.add_argument("--plan", help="run this one plan and print its trace")
    parser.add_argument("--one", action="store_true", help="run only the plan of --seed and print its trace")
    given = parser.parse_args()
    if given.plan or given.one:
        return _print_trace(load(given.plan) if given.plan else make(given.seed), given.mutant)
    schedules = given.schedules or (None if given.seconds else 20_000)
    report = explore(
        given.seed, schedules=schedules, seconds=given.seconds, mutant=given.mutant, progress=_progress
    )
    _print(report)
    for failure in report.failures[:1]:
        _explain(failure, given.mutant)
    caught = bool(report.failures)
    if given.mutant:
        print(f"mutant {given.mutant}: " + (f"caught in {report.seconds:.1f} s" if caught else "NOT caught"))
        return 0 if caught else 1
    return 1 if caught else 0


def _progress(report: Report) -> None:
    if sys.stderr.isatty():
        rate = report.schedules / report.seconds if report.seconds else 0
        print(f"\r{report.schedules} schedules, {rate:.0f}/s", end="", file=sys.stderr)


def _print(report: Report) -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(report.statuses.items()))
    print(
        f"{report.schedules} schedules in {report.seconds:.1f} s ({report.schedules / report.seconds:.0f}/s):"
        f" {report.virtual_hours:.0f} hours of virtual time, {report.steps} steps, {report.faults} faults,"
        f" {report.mails} mails\n{statuses}\n{len(report.failures)} failed"
    )


def _explain(failure: Failure, mutant: str | None) -> None:
    print(f"\nseed {failure.plan.seed}: {'; '.join(failure.violations)}")
    with prepared(mutant):
        smallest = shrink(failure.plan)
    _print_trace(smallest, mutant)
    options = f" --mutant {mutant}" if mutant else ""
    print(f"\nagain: python -m tests.simulation{options} --plan {shlex.quote(dump(smallest))}")


def _print_trace(plan: Plan, mutant: str | None) -> int:
    with prepared(mutant):
        result = try_plan(plan, traced=True)
    print(dump(plan))
    print("\n".join(result.trace))
    print("\n".join(result.violations) or "nothing went wrong")
    return 1 if result.violations else 0


if __name__ == "__main__":
    sys.exit(main())
