"""Figures as text and as JSON, and the ratios of two sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.measure import Figures, median

__all__ = ["as_json", "line", "medians", "ratio", "ratios"]

Rounds = Mapping[str, Sequence[Figures]]

_ORDER = ("api", "validator", "sender", "status", "kafka", "mysql", "dns", "catcher", "sink")


def line(name: str, one: Figures) -> str:
    """Return one measurement in a few words."""
    known = [part for part in _ORDER if part in one.cpu_us]
    parts = [*known, *(part for part in one.cpu_us if part not in known)]
    cpu = "  ".join(f"{part} {one.cpu_us[part]:.0f}" for part in parts)
    refused = f", {one.refused} refused" if one.refused else ""
    return (
        f"  {name}: {one.rate:.0f} tasks/s, {one.create_rate:.0f} created/s{refused},"
        f" {one.total_us:.0f} us of CPU a task ({cpu});"
        f" Create {_times(one.create_ms)} ms, to acceptance {_times(one.accepted_ms)} ms (p50/p99)"
    )


def _times(quantiles: Mapping[str, float]) -> str:
    return f"{quantiles['p50']:.1f}/{quantiles['p99']:.1f}"


def medians(rounds: Rounds) -> str:
    """Return the medians of each load and side, one a line."""
    return "\n".join(["median", *(line(name, median(found)) for name, found in rounds.items())])


def ratio(ours: float, theirs: float) -> float:
    """Return ours / theirs; infinite where theirs is 0."""
    return ours / theirs if theirs else float("inf")


def ratios(rounds: Rounds) -> str:
    """Return what this side has of the other one: rate, CPU in all and by process, latency. 1 is the same."""
    lines = ["this / other"]
    for name in rounds:
        base, _, side = name.rpartition(", ")
        if side != "this" or f"{base}, other" not in rounds:
            continue
        this, other = median(rounds[name]), median(rounds[f"{base}, other"])
        parts = [part for part in _ORDER if this.cpu_us.get(part) and other.cpu_us.get(part)]
        cpu = "  ".join(f"{part} {ratio(this.cpu_us[part], other.cpu_us[part]):.2f}" for part in parts)
        times = "/".join(f"{ratio(this.accepted_ms[q], other.accepted_ms[q]):.2f}" for q in ("p50", "p99"))
        lines.append(
            f"  {base}: rate {ratio(this.rate, other.rate):.2f},"
            f" CPU a task {ratio(this.total_us, other.total_us):.2f} ({cpu}), to acceptance {times}"
        )
    return "\n".join(lines)


def as_json(rounds: Rounds) -> dict[str, Any]:
    """Return the rounds and their medians."""
    return {
        name: {"median": median(found).as_json(), "rounds": [one.as_json() for one in found]}
        for name, found in rounds.items()
    }
