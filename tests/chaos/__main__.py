"""`python -m tests.chaos` kills, freezes and cuts off parts of the system under load."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.chaos.plan import TARGETS, plan
from tests.chaos.report import show
from tests.chaos.runner import Run, can_mount, discard, judge, run

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the plan is a function of it (1)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma separated, of %(default)s")
    parser.add_argument("--rate", type=float, default=40.0, help="tasks a second (40)")
    parser.add_argument("--slack", type=float, default=0.0,
                        help="seconds that recoveries may take beyond what is promised (0)")  # fmt: skip
    parser.add_argument("--settle", type=float, default=60.0,
                        help="seconds from the last fault until all must be settled (60)")  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="print the plan and end")
    parser.add_argument("--mutant", default="", help="run a broken variant (tests/chaos/mutants)")
    parser.add_argument("--keep", action="store_true", help="keep the histories of a good run too")
    parser.add_argument("--folder", type=Path, help="where the histories go (a new temporary folder)")
    parser.add_argument("--check", type=Path, nargs="+", metavar="FOLDER", help="judge kept runs again")
    return parser


def main() -> int:
    """Run. Return 0 when every rule held, 1 when one did not, 2 for a wrong command line."""
    arguments = _parser().parse_args()
    if arguments.check:
        runs = [(*judge(folder, arguments.slack), folder) for folder in arguments.check]
        show(runs)
        return 0 if all(verdict.ok for verdict, *_ in runs) else 1
    targets = [target for target in arguments.targets.split(",") if target]
    if "disk" in targets and not can_mount():
        print("disk: left out, mounting small disks takes root", file=sys.stderr)
        targets.remove("disk")
    try:
        faults = plan(arguments.seed, arguments.minutes * 60, targets)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.plan:
        for fault in faults:
            print(f"{fault.at:7.1f}  {fault.name}  {fault.seconds:g} s{'' if fault.alone else ' *'}")
        return 0
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix=f"postroad-chaos-{arguments.seed}-"))
    folder.mkdir(parents=True, exist_ok=True)
    spec = Run(
        arguments.seed, arguments.minutes * 60, faults, arguments.rate, "disk" in targets,
        arguments.mutant, arguments.slack, arguments.settle,
    )  # fmt: skip
    print(f"seed {spec.seed}, {arguments.minutes:g} min, {spec.rate:g} tasks/s, load average"
          f" {os.getloadavg()[0]:.1f}; histories in {folder}", flush=True)  # fmt: skip
    verdict, evidence = run(spec, folder, lambda line: print(line, flush=True))
    show([(verdict, evidence, folder)])
    if verdict.ok and not (arguments.keep or arguments.folder):
        discard(folder)
    else:
        print(f"histories and logs: {folder}")
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
