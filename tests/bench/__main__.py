"""The speed of the whole pipeline: `python -m tests.bench [--tasks N] [--rate R] [--json]`.

It starts a local stack of its own and loads it with Creates and BatchCreates. The mail catcher's journal, not
a service, says when each mail was accepted. The CPU is that of every process of the stack, with Kafka, MySQL,
DNS and the mail server, but without the load itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import uvloop

from tests.bench.load import Sent, at_rate, by_batches, by_callers
from tests.bench.pipeline import Journal, quantiles, stack
from tests.bench.usage import usage


async def measured(folder: Path, journal: Journal, load: Any) -> dict[str, Any]:
    before, start = usage(folder / "pids"), time.time()
    sent: Sent = await load
    await journal.holds(set(sent.called_at))
    last = max(journal.accepted[task] for task in sent.called_at)
    # The status fold may still be behind: its CPU belongs to these tasks.
    await asyncio.sleep(1.0)
    after = usage(folder / "pids")
    tasks = len(sent.called_at)
    cpu = {name: (after[name].cpu_seconds - before[name].cpu_seconds) / tasks * 1000 for name in after}
    return {
        "tasks": tasks,
        "errors": len(sent.errors),
        "first_error": sent.errors[0] if sent.errors else "",
        "copies": journal.copies,
        "tasks_per_second": round(tasks / (last - start)),
        "cpu_ms_per_task": {"total": round(sum(cpu.values()), 3)} | {n: round(v, 3) for n, v in cpu.items()},
        "create_ms": quantiles(sent.seconds),
        "create_to_accepted_ms": quantiles([journal.accepted[t] - at for t, at in sent.called_at.items()]),
        "resident_mb": {name: round(u.resident_mb) for name, u in after.items()},
    }


def table(name: str, row: dict[str, Any]) -> str:
    lines = [
        name,
        f"  tasks {row['tasks']}, errors {row['errors']} {row['first_error']}, copies {row['copies']}",
        f"  end to end              {row['tasks_per_second']} tasks/s",
        f"  Create answered         {row['create_ms']} ms",
        f"  Create to acceptance    {row['create_to_accepted_ms']} ms",
        "  CPU a task              "
        + "  ".join(f"{n} {v:.3f}" for n, v in row["cpu_ms_per_task"].items())
        + " ms",
        "  resident                " + "  ".join(f"{n} {v}" for n, v in row["resident_mb"].items()) + " MB",
    ]
    return "\n".join(lines)


async def bench(
    *, tasks: int, callers: int, batches: int, size: int, rate: float, seconds: float
) -> dict[str, Any]:
    with stack() as (folder, env):
        targets = [env["POSTROAD_API"]]
        journal = Journal(folder / "mail" / "journal.jsonl")
        # Connections, caches and the JVM's compiler warm up first: a service runs for weeks.
        warm = await by_callers(targets, 3000, callers)
        await journal.holds(set(warm.called_at))
        full = await measured(folder, journal, by_callers(targets, tasks, callers))
        bulk = await measured(folder, journal, by_batches(targets, tasks, batches, size))
        steady = await measured(folder, journal, at_rate(targets, rate, seconds))
    return {
        f"as fast as {callers} callers can": full,
        f"as fast as {batches} callers can, {size} at a time": bulk,
        f"steady {rate:g}/s": steady,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tasks", type=int, default=15000)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--batches", type=int, default=4, help="callers of BatchCreate")
    parser.add_argument("--size", type=int, default=250, help="tasks in a BatchCreate")
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    result = uvloop.run(
        bench(
            tasks=given.tasks,
            callers=given.callers,
            batches=given.batches,
            size=given.size,
            rate=given.rate,
            seconds=given.seconds,
        )
    )
    print(json.dumps(result, indent=1) if given.json else "\n".join(table(n, r) for n, r in result.items()))


if __name__ == "__main__":
    main()
