"""What `postroad rebuild` shows of its report."""

from __future__ import annotations

from uuid import UUID

import pytest

from services.cli.command import CommandContext
from services.cli.rebuild_command import _row, _show
from services.common.operations.rebuild.report import RebuildReport, RowDifference


def shown(capsys: pytest.CaptureFixture[str], report: RebuildReport, yes: bool) -> dict[str, str]:
    _show(CommandContext({}), _row(report), yes)
    lines = capsys.readouterr().out.splitlines()
    return {title.strip(): value for title, _, value in (line.rpartition(" ") for line in lines)}


def test_a_rebuild_that_only_restored_rows_shows_no_swap(capsys: pytest.CaptureFixture[str]) -> None:
    restored = shown(capsys, RebuildReport(deliveries=3, bodies=2), True)
    assert (restored["deliveries restored"], restored["bodies restored"]) == ("3", "2")
    assert "swapped in" not in restored
    compared = shown(capsys, RebuildReport(deliveries=3), False)
    assert (compared["deliveries missing"], compared["swapped in"]) == ("3", "no")
    exchanged = shown(capsys, RebuildReport(deliveries=3, differing=1, swapped=True), True)
    assert (exchanged["deliveries restored"], exchanged["swapped in"]) == ("3", "yes")
    kept = shown(capsys, RebuildReport(differing=1), True)
    assert kept["swapped in"] == "no"


def test_a_rebuild_says_how_many_differences_it_does_not_show(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [RowDifference("tasks", UUID(int=n), "", "missing", ()) for n in range(10)]
    _show(CommandContext({}), _row(RebuildReport(missing=12, lines_extra=1, samples=samples)), False)
    assert capsys.readouterr().out.endswith("\n... and 3 more\n")
    _show(CommandContext({}), _row(RebuildReport(missing=10, samples=samples)), False)
    assert "more" not in capsys.readouterr().out
