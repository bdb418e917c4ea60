"""Prints the results of runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.checker import Evidence, Recovery, Verdict
from tests.chaos.history import load

__all__ = ["show", "table"]

_MOST = 25


def show(runs: Sequence[tuple[Verdict, Evidence, Path]]) -> None:
    """Print a table of runs, then their faults, recoveries and breaches."""
    console = Console(width=150, highlight=False)
    history = [entry for _, _, folder in runs for entry in load(folder / "history.jsonl")]
    seeds = [entry["seed"] for entry in history if entry["what"] == "run"]
    console.print(table([(seed, verdict) for seed, (verdict, *_) in zip(seeds, runs, strict=True)]))
    _count(console, "faults", [f"{e['kind']} {e['target']}" for e in history if e["what"] == "begins"])
    _count(
        console, "ended by themselves", [f"{e['name']} ({e['code']})" for e in history if e["what"] == "exit"]
    )
    _count(console, "had to be killed", [e["name"] for e in history if e["what"] == "unclean"])
    console.print(_recovery([recovery for _, evidence, _ in runs for recovery in evidence.recoveries]))
    breaches = [breach for verdict, *_ in runs for breach in verdict.breaches]
    for rule, what in breaches[:_MOST]:
        console.print(f"{rule}: {what}", style="red", markup=False)
    if len(breaches) > _MOST:
        console.print(f"... and {len(breaches) - _MOST} more", style="red")


def _count(console: Console, what: str, names: Sequence[str]) -> None:
    if names:
        counted = ", ".join(f"{name} {count}" for name, count in sorted(Counter(names).items()))
        console.print(f"{what} ({len(names)}): {counted}")


def table(runs: Sequence[tuple[int, Verdict]]) -> Table:
    """Return a table with the figures of each run, by seed."""
    found = Table(box=None, pad_edge=False)
    columns = ("seed", "tasks", "acknowledged", "refused", "unknown", "settled", "deferred", "lost", "copies",
               "explained", "unexplained", "verdict")  # fmt: skip
    for column in columns:
        found.add_column(column, justify="right")
    for seed, verdict in runs:
        values = [str(getattr(verdict, column)) for column in columns[1:-1]]
        broken = ", ".join(f"{rule} {n}" for rule, n in Counter(r for r, _ in verdict.breaches).items())
        found.add_row(str(seed), *values, "ok" if verdict.ok else broken)
    return found


def _recovery(recoveries: Sequence[Recovery]) -> Table:
    by_kind: dict[tuple[str, str], list[Recovery]] = defaultdict(list)
    for recovery in recoveries:
        kind, target, *_ = recovery.fault.split()
        by_kind[f"{kind} {target.partition('-')[0]}", recovery.what].append(recovery)
    found = Table(box=None, pad_edge=False)
    for column in ("fault", "", "times", "median s", "longest s", "promised s"):
        found.add_column(column, justify="right" if column.endswith(("s", "s")) else "left")
    for (kind, what), all_ in sorted(by_kind.items()):
        took = sorted(r.seconds for r in all_ if r.seconds is not None)
        never = sum(r.gave_up for r in all_)
        limit = all_[0].limit
        found.add_row(
            kind,
            what,
            f"{len(took)} of {len(all_)}",
            f"{took[len(took) // 2]:.1f}" if took else "",
            "not in time" if never else f"{took[-1]:.1f}" if took else "",
            f"{limit:g}" if limit else "",
        )
    return found
