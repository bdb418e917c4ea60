"""Which letters are meant. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from services.cli.dead.letter import Letter, Place

__all__ = ["groups", "missing", "picked"]


def picked(letters: Iterable[Letter], places: Collection[Place], cause: str) -> list[Letter]:
    """Return the letters at these places, or all where none is named, whose cause contains `cause`.

    In the order of their places.
    """
    meant = (letter for letter in letters if not places or letter.place in places)
    return sorted((letter for letter in meant if cause in letter.cause), key=lambda letter: letter.place)


def missing(letters: Iterable[Letter], places: Collection[Place]) -> list[Place]:
    """Return those of the places where no letter is."""
    there = {letter.place for letter in letters}
    return sorted(place for place in places if place not in there)


def groups(letters: Iterable[Letter]) -> list[dict[str, Any]]:
    """Return the letters of each stage and cause as one row, those with the most letters first."""
    found: dict[tuple[str, str], list[Letter]] = {}
    for letter in letters:
        found.setdefault((letter.place.stage, letter.cause), []).append(letter)
    rows: list[dict[str, Any]] = []
    for (stage, cause), group in found.items():
        first, last = (bound(group, key=lambda letter: (letter.at_ms, letter.place)) for bound in (min, max))
        rows.append(
            {
                "stage": stage,
                "count": len(group),
                "first": first.time,
                "last": last.time,
                "sample": str(last.place),
                "cause": cause,
                "origins": sorted({letter.origin.topic for letter in group if letter.origin is not None}),
            }
        )
    return sorted(rows, key=lambda row: (row["stage"], -row["count"], row["cause"]))
