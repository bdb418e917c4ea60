"""Results on stdout: as a table for people, as JSON for programs.

A command makes rows, plain dictionaries of what JSON can hold, and says by `Column`s which of it a table
shows. `Output.rows` writes many, `Output.one` a single one, `Output.lines` rows that come in time. In
`json` a command's result is one document (an array or an object), in `jsonl` one object a line.

A table fits the terminal: columns that may be cut end in an ellipsis, and those of a higher rank are left
out first; ids are never cut. Into a pipe nothing is cut, left out or coloured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeAlias

from services.cli.layout import GAP, Shape, widths

__all__ = ["Column", "Form", "Output", "Row", "plain", "safe_text"]

Row: TypeAlias = Mapping[str, Any]

_NOTHING: tuple[object, ...] = (None, "", {}, [])
_STYLES = {
    "completed": "green",
    "failed": "red",
    "uncertain": "magenta",
    "cancelled": "dim",
    "processing": "yellow",
    "pending": "cyan",
}


class Form(StrEnum):
    """What `-o` may be."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


def plain(value: object) -> str:
    """Return a value as a table's cell: one line, and no control character reaches the terminal."""
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
    """Return a text of several lines without the control characters that would steer the terminal."""
    return "\n".join("\t".join(map(plain, line.split("\t"))) for line in text.splitlines())


@dataclass(frozen=True, slots=True)
class Column:
    """One column: the row's key it shows, its title, and how it gives way where room is short.

    `least` 0: never cut; otherwise cut to that width at least. `rank` 0: always there; otherwise the highest
    goes first. `cell` makes the text from the value. `width` is its usual width, for rows that come in time.
    `tail`: what is cut loses its beginning, since the end tells one from another.
    """

    key: str
    title: str = ""
    least: int = 0
    rank: int = 0
    right: bool = False
    cell: Callable[[Any], str] = plain
    width: int = 0
    tail: bool = False

    @property
    def heading(self) -> str:
        """What stands above it."""
        return (self.title or self.key.replace("_", " ")).upper()

    def text(self, row: Row) -> str:
        """Return the cell of a row."""
        return self.cell(row.get(self.key))


class Output:
    """stdout in one of the forms. `width` None: the terminal's, or without bound where there is none."""

    def __init__(self, form: Form, width: int | None = None) -> None:
        self.form = form
        self._width = width

    @property
    def is_table(self) -> bool:
        """Whether people read it."""
        return self.form is Form.TABLE

    def rows(self, rows: Iterable[Row], columns: Sequence[Column], empty: str = "") -> None:
        """Write rows; those that came before the iterable raised an error too, where there were any.

        `empty` goes to stderr where a table would have none.
        """
        if self.form is Form.JSONL:
            for row in rows:
                _line(row)
            return
        gathered: list[Row] = []
        whole = False
        try:
            for row in rows:
                gathered.append(row)
            whole = True
        finally:
            # An empty array would say that there are none, where nothing was found out.
            if self.form is Form.JSON and (gathered or whole):
                _document(gathered)
            elif gathered:
                self.table(gathered, columns)
        if not gathered and empty and self.form is Form.TABLE:
            print(empty, file=sys.stderr)

    def one(self, row: Row, show: Callable[[Row], None] | None = None) -> None:
        """Write one object. `show` writes it for people; without it, a line for each of its values."""
        if self.form is Form.JSON:
            _document(row)
        elif self.form is Form.JSONL:
            _line(row)
        elif show is not None:
            show(row)
        else:
            self.values(row)

    def values(self, row: Row, titles: Mapping[str, str] | None = None) -> None:
        """Write a table of names and values, of those values that are there."""
        titles = titles or {key: key.replace("_", " ") for key in row}
        there = [(title, plain(row[key])) for key, title in titles.items() if row.get(key) not in _NOTHING]
        indent = max((len(title) for title, _ in there), default=0) + GAP
        console = self._console()
        for title, value in there:
            console.print(f"{title:<{indent}}", end="", style="bold", markup=False)
            console.print(value, style=_STYLES.get(value), markup=False, soft_wrap=True)

    def table(self, rows: Sequence[Row], columns: Sequence[Column]) -> None:
        """Write a table for people."""
        cells = [[column.text(row) for column in columns] for row in rows]
        natural = [max([len(c.heading), *(_cells(line[i]) for line in cells)]) for i, c in enumerate(columns)]
        self._print(columns, natural, cells, heading=True)

    def lines(self, columns: Sequence[Column]) -> Callable[[Row], None]:
        """Return what writes one row at once; a table's columns have their usual widths."""
        if self.form is not Form.TABLE:
            return lambda row: _line(row, flush=True)
        natural = [max(column.width, len(column.heading)) for column in columns]
        first = True

        def write(row: Row) -> None:
            nonlocal first
            line = [column.text(row) for column in columns]
            needed = natural
            if self.bound is None:
                needed = [max(n, _cells(c)) for n, c in zip(natural, line, strict=True)]
            self._print(columns, needed, [line], heading=first)
            first = False

        return write

    @property
    def bound(self) -> int | None:
        """The columns that a line may have; None where there is no bound."""
        if self._width is not None:
            return self._width
        return self._console().width if sys.stdout.isatty() else None

    def _print(
        self, columns: Sequence[Column], natural: Sequence[int], cells: Sequence[Sequence[str]], heading: bool
    ) -> None:
        from rich.text import Text  # noqa: PLC0415

        shapes = [Shape(n, c.least, c.rank) for n, c in zip(natural, columns, strict=True)]
        given = widths(shapes, self.bound)
        shown = [i for i, width in enumerate(given) if width]
        console = self._console()

        def line(texts: Sequence[str], style: str = "") -> None:
            whole = Text(style=style)
            for i in shown:
                # Nothing is filled up behind the last column, and what is never cut is not cut here either.
                last = i == shown[-1]
                text = _tail(texts[i], given[i]) if columns[i].tail else texts[i]
                cell = Text(text, style=style or _STYLES.get(texts[i], ""))
                if columns[i].least:
                    cell.truncate(given[i], overflow="ellipsis")
                missing = max(0, given[i] - cell.cell_len)
                if columns[i].right:
                    cell.pad_left(missing)
                elif not last:
                    cell.pad_right(missing)
                whole.append(cell)
                if not last:
                    whole.append(" " * GAP)
            whole.rstrip()
            console.print(whole, soft_wrap=True)

        if heading:
            line([column.heading for column in columns], "bold")
        for texts in cells:
            line(texts)
        console.file.flush()

    def _console(self) -> Any:
        from rich.console import Console  # noqa: PLC0415

        # Rich leaves out the colours alone; whoever asks for none wants no escape sequences either.
        colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
        return Console(highlight=False, width=self._width, color_system=colours)


def _cells(text: str) -> int:
    from rich.cells import cell_len  # noqa: PLC0415

    return cell_len(text)


def _tail(text: str, width: int) -> str:
    """Return the text, or so much of its end behind an ellipsis as fits."""
    if _cells(text) <= width:
        return text
    while _cells(text) >= width:
        text = text[1:]
    return "…" + text


def _document(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def _line(row: Row, flush: bool = False) -> None:
    print(json.dumps(row, ensure_ascii=False), flush=flush)
