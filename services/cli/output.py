"""Results on stdout: a table for people, JSON for programs.

A command makes rows: dictionaries of what JSON can hold. Its `Column`s say which values a table shows.
`Output.rows` writes many rows, `Output.one` a single one, and `Output.row_writer` rows that arrive over time.
In `json` a command's result is one document (an array or an object), in `jsonl` one object a line.

A table fits the terminal. Columns that may be cut end in an ellipsis, those of the highest rank are dropped
first, and ids are never cut. Into a pipe nothing is cut, dropped or coloured.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeAlias

from services.cli.layout import GAP, ColumnSize, column_widths

__all__ = ["Column", "Output", "OutputFormat", "OutputRow", "one_line", "safe_text"]

OutputRow: TypeAlias = Mapping[str, Any]

_EMPTY: tuple[object, ...] = (None, "", {}, [])
_STYLES = {
    "completed": "green",
    "failed": "red",
    "uncertain": "magenta",
    "cancelled": "dim",
    "processing": "yellow",
    "pending": "cyan",
}


class OutputFormat(StrEnum):
    """The values of `-o`."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


def one_line(value: object) -> str:
    """Return a value as one line of text, without control characters that would steer the terminal."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        value = ",".join(f"{key}={item}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def safe_text(text: str) -> str:
    """Return a text of several lines without control characters that would steer the terminal."""
    return "\n".join("\t".join(map(one_line, line.split("\t"))) for line in text.splitlines())


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: the row's key, its title, and how it gives way where the terminal is narrow.

    `min_width` 0: the column is never cut. Otherwise it is cut to no less than that. `rank` 0: it is always
    shown. Otherwise the highest rank is dropped first. `format` makes a cell's text from the value.
    `usual_width` is the width for rows that arrive over time. With `keep_end` a cut cell loses its beginning:
    its end identifies it.
    """

    key: str
    title: str = ""
    min_width: int = 0
    rank: int = 0
    align_right: bool = False
    format: Callable[[Any], str] = one_line
    usual_width: int = 0
    keep_end: bool = False

    @property
    def heading(self) -> str:
        """The text in the table's first line."""
        return (self.title or self.key.replace("_", " ")).upper()

    def cell(self, row: OutputRow) -> str:
        """Return the text of the row's cell."""
        return self.format(row.get(self.key))


class Output:
    """Writes results to stdout in one format. `width` None: the terminal's; without a terminal, no limit."""

    def __init__(self, format_: OutputFormat, width: int | None = None) -> None:
        self.format = format_
        self._width = width

    @property
    def is_table(self) -> bool:
        """Whether the output is for people."""
        return self.format is OutputFormat.TABLE

    @property
    def max_width(self) -> int | None:
        """The most characters of a line, None where there is no limit."""
        if self._width is not None:
            return self._width
        return self._console().width if sys.stdout.isatty() else None

    def rows(self, rows: Iterable[OutputRow], columns: Sequence[Column], empty: str = "") -> None:
        """Write rows. If the iterable raises an error, the rows before it are written.

        `empty` goes to stderr in place of a table without rows.
        """
        if self.format is OutputFormat.JSONL:
            for row in rows:
                _print_json_line(row)
            return
        gathered: list[OutputRow] = []
        complete = False
        try:
            for row in rows:
                gathered.append(row)
            complete = True
        finally:
            # After an error, an empty array would wrongly say that there are no rows.
            if self.format is OutputFormat.JSON and (gathered or complete):
                _print_json(gathered)
            elif gathered:
                self.table(gathered, columns)
        if not gathered and empty and self.is_table:
            print(empty, file=sys.stderr)

    def one(self, row: OutputRow, show: Callable[[OutputRow], None] | None = None) -> None:
        """Write one object. `show` writes it for people. Without it, each value has a line."""
        if self.format is OutputFormat.JSON:
            _print_json(row)
        elif self.format is OutputFormat.JSONL:
            _print_json_line(row)
        elif show is not None:
            show(row)
        else:
            self.values(row)

    def values(self, row: OutputRow, titles: Mapping[str, str] | None = None) -> None:
        """Write a line with title and value for each value that is not empty."""
        titles = titles or {key: key.replace("_", " ") for key in row}
        filled = [(title, one_line(row[key])) for key, title in titles.items() if row.get(key) not in _EMPTY]
        indent = max((len(title) for title, _ in filled), default=0) + GAP
        console = self._console()
        for title, value in filled:
            console.print(f"{title:<{indent}}", end="", style="bold", markup=False)
            console.print(value, style=_STYLES.get(value), markup=False, soft_wrap=True)

    def table(self, rows: Sequence[OutputRow], columns: Sequence[Column]) -> None:
        """Write a table for people."""
        cells = [[column.cell(row) for column in columns] for row in rows]
        natural = [max([len(c.heading), *(_width(line[i]) for line in cells)]) for i, c in enumerate(columns)]
        self._print_table(columns, natural, cells, heading=True)

    def row_writer(self, columns: Sequence[Column]) -> Callable[[OutputRow], None]:
        """Return a function that writes one row at once. A table's columns have their usual widths."""
        if not self.is_table:
            return lambda row: _print_json_line(row, flush=True)
        usual = [max(column.usual_width, len(column.heading)) for column in columns]
        first = True

        def write(row: OutputRow) -> None:
            nonlocal first
            cells = [column.cell(row) for column in columns]
            widths = [
                max(width, _width(cell)) if self.max_width is None or not column.min_width else width
                for column, width, cell in zip(columns, usual, cells, strict=True)
            ]
            self._print_table(columns, widths, [cells], heading=first)
            first = False

        return write

    def _print_table(
        self, columns: Sequence[Column], natural: Sequence[int], cells: Sequence[Sequence[str]], heading: bool
    ) -> None:
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        sizes = [ColumnSize(n, c.min_width, c.rank) for n, c in zip(natural, columns, strict=True)]
        widths = column_widths(sizes, self.max_width)
        shown = [i for i, width in enumerate(widths) if width]
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_header=heading)
        for i in shown:
            justify: Literal["left", "right"] = "right" if columns[i].align_right else "left"
            # Rich would read square brackets in a text as its markup.
            title = Text(columns[i].heading, style="bold")
            table.add_column(title, width=widths[i], justify=justify, no_wrap=True, overflow="ellipsis")
        for line in cells:
            texts = [_end_of(line[i], widths[i]) if columns[i].keep_end else line[i] for i in shown]
            table.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in texts))
        console = self._console()
        # Columns that are never cut may need more than the terminal has. Rich would shrink them.
        options = console.options.update(width=sum(widths) + GAP * len(shown))
        for rendered in console.render_lines(table, options, pad=False):
            whole = Text.assemble(*((segment.text, segment.style or "") for segment in rendered))
            whole.rstrip()
            console.print(whole, soft_wrap=True)
        console.file.flush()

    def _console(self) -> Any:
        from rich.console import Console  # noqa: PLC0415

        # With NO_COLOR, Rich still writes bold text. The user wants no escape sequences at all.
        colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
        return Console(highlight=False, width=self._width, color_system=colours)


def _width(text: str) -> int:
    from rich.cells import cell_len  # noqa: PLC0415

    return cell_len(text)


def _end_of(text: str, width: int) -> str:
    """Return the text, or as much of its end as fits behind an ellipsis."""
    if _width(text) <= width:
        return text
    while _width(text) >= width:
        text = text[1:]
    return "…" + text


def _print_json(value: object) -> None:
    print(_without_c1(json.dumps(value, ensure_ascii=False, indent=2)))


def _print_json_line(row: OutputRow, flush: bool = False) -> None:
    print(_without_c1(json.dumps(row, ensure_ascii=False)), flush=flush)


def _without_c1(document: str) -> str:
    # A terminal obeys these too, and JSON escapes only those below U+0020.
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", document)
