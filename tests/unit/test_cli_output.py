"""The output formats."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from services.cli.output import Column, Output, OutputFormat, one_line, safe_text
from services.cli.times import format_duration, format_time, format_time_ms

ROWS = [
    {
        "id": "01a2-0001",
        "status": "failed",
        "reply": "550 no such user, and a long story about it",
        "labels": {"a": "1"},
    },
    {"id": "01a2-0002", "status": "completed", "reply": "", "labels": {}},
]
COLUMNS = (Column("id"), Column("status"), Column("reply", min_width=8, rank=1), Column("labels", rank=2))


def test_json_is_one_document_and_jsonl_an_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Output(OutputFormat.JSON).rows(ROWS, COLUMNS)
    assert json.loads(capsys.readouterr().out) == ROWS
    Output(OutputFormat.JSONL).rows(ROWS, COLUMNS)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == ROWS
    Output(OutputFormat.JSON).rows([], COLUMNS)
    assert json.loads(capsys.readouterr().out) == []
    Output(OutputFormat.JSON).one(ROWS[0])
    assert json.loads(capsys.readouterr().out) == ROWS[0]


def test_json_has_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"reply": "".join(map(chr, range(0xA1))) + "é"}
    Output(OutputFormat.JSONL).rows([row], COLUMNS)
    Output(OutputFormat.JSON).one(row)
    shown = capsys.readouterr().out
    assert all(character.isprintable() or character in "\n\xa0" for character in shown)
    line, _, document = shown.partition("\n")
    assert json.loads(line) == json.loads(document) == row
    assert "é" in line


def test_a_table_fits_its_width_and_keeps_ids(capsys: pytest.CaptureFixture[str]) -> None:
    Output(OutputFormat.TABLE, 40).rows(ROWS, COLUMNS)
    assert capsys.readouterr().out.splitlines() == [
        "ID         STATUS     REPLY       LABELS",
        "01a2-0001  failed     550 no su…  a=1",
        "01a2-0002  completed",
    ]
    Output(OutputFormat.TABLE, 37).rows(ROWS, COLUMNS)
    assert capsys.readouterr().out.splitlines()[1] == "01a2-0001  failed     550 no such us…"
    Output(OutputFormat.TABLE, 24).rows(ROWS, COLUMNS)
    assert capsys.readouterr().out.splitlines()[1] == "01a2-0001  failed"


def test_a_table_without_rows_is_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    Output(OutputFormat.TABLE, 40).table([], COLUMNS)
    assert capsys.readouterr().out.splitlines() == ["ID  STATUS  REPLY  LABELS"]


def test_into_a_pipe_nothing_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    Output(OutputFormat.TABLE).rows(ROWS, COLUMNS)
    assert ROWS[0]["reply"] in capsys.readouterr().out  # type: ignore[operator]


def test_wide_characters_are_counted_as_they_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Output(OutputFormat.TABLE, 14).rows(
        [{"a": "漢字漢字漢字", "b": "x"}], (Column("a", min_width=4), Column("b"))
    )
    assert capsys.readouterr().out.splitlines()[1] == "漢字漢字漢…  x"


def test_an_empty_result_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Output(OutputFormat.TABLE).rows([], COLUMNS, empty="No such task.")
    assert capsys.readouterr() == ("", "No such task.\n")
    Output(OutputFormat.JSONL).rows([], COLUMNS, empty="No such task.")
    assert capsys.readouterr() == ("", "")


def test_rows_before_an_error_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    def rows() -> Iterator[dict[str, object]]:
        yield ROWS[0]
        raise RuntimeError

    for form in OutputFormat:
        with pytest.raises(RuntimeError):
            Output(form).rows(rows(), COLUMNS)
        assert "01a2-0001" in capsys.readouterr().out


@pytest.mark.parametrize("form", OutputFormat)
def test_an_error_before_the_first_row_leaves_no_result(
    form: OutputFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows() -> Iterator[dict[str, object]]:
        raise RuntimeError
        yield {}

    with pytest.raises(RuntimeError):
        Output(form).rows(rows(), COLUMNS, empty="There are none.")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("width", "shown"), [(20, "sender-6d4f-x2x4z-1"), (12, "…d4f-x2x4z-1"), (9, "…-x2x4z-1")]
)
def test_a_cell_may_be_cut_at_its_beginning(
    width: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = (Column("replica", min_width=7, keep_end=True),)
    Output(OutputFormat.TABLE, width).rows([{"replica": "sender-6d4f-x2x4z-1"}], columns)
    assert len(shown) <= width
    assert capsys.readouterr().out.splitlines()[1] == shown


def test_no_cell_steers_the_terminal() -> None:
    assert one_line("a\x1b[31mb\nc\u202ed") == r"a\x1b[31mb\nc\u202ed"
    assert one_line({"a": "1", "b": "2"}) == "a=1,b=2"
    assert [one_line(v) for v in (None, True, False, 0)] == ["", "yes", "no", "0"]
    assert safe_text("one\ttwo\r\nthree\x1b]0;x\x07") == "one\ttwo\nthree\\x1b]0;x\\x07"


def test_times_and_durations() -> None:
    assert format_time("2026-01-31T12:00:00.123456Z") == "2026-01-31T12:00:00Z"
    assert format_time_ms("2026-01-31T12:00:00.123456Z") == "2026-01-31T12:00:00.123Z"
    assert format_time_ms("2026-01-31T12:00:00Z") == "2026-01-31T12:00:00.000Z"
    assert (format_time(None), format_time_ms(None), format_duration(None)) == ("", "", "")
    assert [format_duration(s) for s in (0, 0.35, 12.2, 60, 200, 7200, 187200, -5)] == [
        *("0ms", "350ms", "12s", "1m", "3m20s", "2h", "2d4h", "-5s")
    ]
