"""The scenario `limit`: Postroad beside a bare sketch of the same pipeline, in turn on one machine.

The sketch's folder has an `infra.py` with servers of its own. Its `driver.py` runs a case and appends a JSON
line for each load (its README). Each round runs every case once, and then this clone's services on a fresh
installation with the same loads. Both warm their broker up first. Compare with the same database server: the
sketch runs MariaDB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.local.jars import jars_path
from tests.bench import options, report, throughput
from tests.bench.measure import Figures, median
from tests.bench.receivers import quick_sink
from tests.bench.servers import Installation, running_servers

__all__ = ["CASES", "compared", "run"]

CASES = ("i-base", "i-throughput", "i-nowait")
_TASKS = 20_000
_RATE, _SECONDS = 200, 10
LOADS = {
    "unary64": throughput.unary(_TASKS, 64),
    "batch500": throughput.batch(_TASKS),
    "rate200": throughput.steady(_RATE, _SECONDS),
}
# The latency of the pipeline is compared with the case that is tuned for it.
_LATENCY_CASE = "i-nowait"
_STARTS_WITHIN = 120.0

Rows = list[dict[str, Any]]


class Sketch:
    """The sketch in `folder`, with its data under `work`."""

    def __init__(self, folder: Path, work: Path) -> None:
        self._folder, self._results = folder, work / "results.jsonl"
        self._environment = {
            **os.environ,
            "E2E_WORK": str(work),
            "E2E_RESULTS": str(self._results),
            "KAFKA_LIBS": str(jars_path()),
            # Its folder may be read-only.
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._ready = work / "infra.json"

    @contextmanager
    def servers(self) -> Iterator[None]:
        """Run its servers within the block. Raises RuntimeError when they do not start."""
        argv = [sys.executable, str(self._folder / "infra.py")]
        with subprocess.Popen(argv, env=self._environment) as infra:
            try:
                end = time.monotonic() + _STARTS_WITHIN
                while not (self._ready.exists() and self._ready.read_text()):
                    if infra.poll() is not None or time.monotonic() > end:
                        raise RuntimeError("the sketch's servers did not start")
                    time.sleep(0.2)
                time.sleep(3)
                yield
            finally:
                infra.send_signal(signal.SIGTERM)

    def case(self, name: str) -> Rows:
        """Run one case; return a row for each load. Raises RuntimeError where it fails or its counts do."""
        self._results.unlink(missing_ok=True)
        argv = [sys.executable, str(self._folder / "driver.py"), name, "1"]
        subprocess.run(argv, env=self._environment, check=True)
        rows = [json.loads(line) for line in self._results.read_text().splitlines()]
        if not rows or not all(row["counts_ok"] for row in rows):
            raise RuntimeError(f"the sketch's counts are wrong: {rows}")
        return rows


def compared(ours: Mapping[str, Figures], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the lines that compare the medians by load. `rows` are the sketch's, of all rounds and cases.

    A rate is compared with the case that has the highest, CPU with the one that has the least.
    """
    of: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        of.setdefault(row["load"], {}).setdefault(row["name"], []).append(row)

    def best(load: str, field: str, choose: Any) -> tuple[float, str]:
        found = ((statistics.median(row[field] for row in of[load][case]), case) for case in of[load])
        return choose(found)  # type: ignore[no-any-return]

    lines = []
    for load in ("unary64", "batch500"):
        rate, by_rate = best(load, "rate", max)
        cpu, by_cpu = best(load, "system_us", min)
        one = ours[load]
        lines.append(
            f"{load}: rate {one.rate:.0f} / {rate:.0f} ({by_rate}) = {report.ratio(one.rate, rate):.2f},"
            f" CPU a task {one.total_us:.0f} / {cpu:.0f} us ({by_cpu}) ="
            f" {report.ratio(one.total_us, cpu):.2f}"
        )
    for case, found in of["rate200"].items():
        one, middle = (
            ours["rate200"],
            {
                field: statistics.median(row[field] for row in found)
                for field in ("system_us", "mail_p50_ms", "mail_p99_ms")
            },
        )
        mark = " (tuned for latency)" if case == _LATENCY_CASE else ""
        cpu_ratio = report.ratio(one.total_us, middle["system_us"])
        parts = [f"CPU a task {one.total_us:.0f} / {middle['system_us']:.0f} us = {cpu_ratio:.2f}"]
        for q in ("p50", "p99"):
            theirs = middle[f"mail_{q}_ms"]
            times = report.ratio(one.accepted_ms[q], theirs)
            parts.append(f"{q} {one.accepted_ms[q]:.1f} / {theirs:.1f} ms = {times:.2f}")
        lines.append(f"rate200 and {case}{mark}: {', '.join(parts)}")
    return lines


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Run the scenario; return both sides' figures of every round."""
    rows: Rows = []
    rounds: dict[str, list[Figures]] = {}
    work = Path(tempfile.mkdtemp(prefix="postroad-bench-"))
    sketch = Sketch(given.folder.resolve(), work)
    try:
        with running_servers(given.database) as servers, quick_sink() as sink, sketch.servers():
            sketch.case("warm")
            throughput.warm_up(servers, sink, given.warm_up)
            for number in range(given.rounds):
                print(f"round {number + 1}", flush=True)
                for case in given.cases:
                    rows += sketch.case(case)
                with Installation(servers, sink, **options.settings(given)) as installation:
                    for name, one in throughput.measured(installation, LOADS).items():
                        rounds.setdefault(name, []).append(one)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    ours = {name: median(found) for name, found in rounds.items()}
    lines = compared(ours, rows)
    print(report.medians(rounds), "Postroad / sketch", *lines, sep="\n")
    return {"postroad": report.as_json(rounds), "sketch": rows, "ratios": lines}
