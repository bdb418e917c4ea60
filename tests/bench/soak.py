"""An hour at a steady rate, with a problem in one task of a hundred: `python -m tests.bench soak`.

It starts a local stack of its own and prints the services' memory each minute. It fails if one of them grows
by more than a fifth after its first ten minutes. It also fails if a task is lost, a mail is sent twice, or a
task stays unsettled without a delay that explains it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Mapping

import grpc
import uvloop

from deploy.local.state import SERVICES
from postroad.v1 import task_service_pb2 as pb
from postroad.v1 import task_service_pb2_grpc as rpc
from tests.bench.load import at_rate
from tests.bench.pipeline import Journal, stack
from tests.bench.usage import usage

REPLICAS = tuple(f"{service}-1" for service in SERVICES)
GROWTH = 0.20
_WARM_UP = 10
# What the longest delay of a first retry and its jitter take.
_SETTLE = 150.0

_AMISS = itertools.cycle(
    (
        "greylist+{n}@d{d}.ok.test",
        "u{n}@x{n}.flaky-1.test",
        "reject5+{n}@d{d}.ok.test",
        "drop-before+{n}@d{d}.ok.test",
        "u{n}@nowhere.test",
        "drop-lost+{n}@d{d}.ok.test",
        "shut421+{n}@d{d}.ok.test",
        "u{n}@nullmx.test",
        "data5+{n}@d{d}.ok.test",
        "slow-2000+{n}@d{d}.ok.test",
    )
)


def recipient(number: int) -> str:
    """Return an address for task `number`; every hundredth is one that something goes wrong with."""
    template = "u{n}@d{d}.ok.test" if number % 100 else next(_AMISS)
    return template.format(n=number, d=number % 50)


async def _settled(target: str) -> Mapping[str, int]:
    """Return the tasks by status once none is pending, or as they are when time is up."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = rpc.TaskServiceStub(channel)
        end = time.monotonic() + _SETTLE
        while True:
            counts = dict((await stub.Count(pb.CountRequest(), timeout=60)).counts)
            if not counts["pending"] or time.monotonic() > end:
                return counts
            await asyncio.sleep(2)


async def soak(minutes: int, rate: float) -> bool:
    """Run; print as it goes. Returns whether all held."""
    with stack() as (folder, env):
        target = env["POSTROAD_API"]
        journal = Journal(folder / "mail" / "journal.jsonl")
        resident: list[dict[str, float]] = []
        created, errors = 0, 0
        print("minute  " + "  ".join(f"{name:>11}" for name in REPLICAS) + "    tasks   mails", flush=True)
        for minute in range(1, minutes + 1):
            sent = await at_rate([target], rate, 60, recipient, int((minute - 1) * rate * 60))
            created, errors = created + len(sent.called_at), errors + len(sent.errors)
            journal.read()
            now = usage(folder / "pids")
            resident.append({name: now[name].resident_mb for name in REPLICAS})
            cells = "  ".join(f"{resident[-1][name]:8.1f} MB" for name in REPLICAS)
            print(f"{minute:6}  {cells}  {created:7}  {len(journal.accepted):6}", flush=True)
        counts = await _settled(target)
        journal.read()
        flat = _grown(resident)
        print(f"created {created}, refused {errors}, mails {len(journal.accepted)}, copies {journal.copies}; "
              + ", ".join(f"{status} {n}" for status, n in counts.items() if n))  # fmt: skip
        whole = sum(counts.values()) == created and len(journal.accepted) >= counts["completed"]
        whole = whole and not counts["pending"] and not errors and not journal.copies
        if not (flat and whole):
            print(f"not as promised; the stack's folder: {folder}")
        return flat and whole


def _grown(resident: list[dict[str, float]]) -> bool:
    """Print how the services grew after their warm-up; return whether that was little enough."""
    warm = min(_WARM_UP, len(resident)) - 1
    flat = True
    for name in REPLICAS:
        start, most, end = resident[warm][name], max(r[name] for r in resident[warm:]), resident[-1][name]
        growth = most / start - 1
        flat = flat and growth <= GROWTH
        print(f"{name:12} {start:6.1f} MB after {warm + 1} min, {most:6.1f} at most, {end:6.1f} at the end:"
              f" {growth:+.1%}")  # fmt: skip
    return flat


def main() -> int:
    """Run by the command line; 0 where all held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--rate", type=float, default=200)
    given = parser.parse_args()
    return 0 if uvloop.run(soak(given.minutes, given.rate)) else 1


if __name__ == "__main__":
    sys.exit(main())
