"""The widths of a table's columns in a narrow terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.cli.layout import GAP, ColumnSize, column_widths

ID = ColumnSize(36)


def test_in_a_wide_terminal_each_column_has_its_natural_width() -> None:
    assert column_widths([ID, ColumnSize(10), ColumnSize(30, min_width=8, rank=1)], 80) == [36, 10, 30]


def test_without_a_limit_nothing_is_cut() -> None:
    assert column_widths([ID, ColumnSize(5000, min_width=8, rank=1)], None) == [36, 5000]


def test_columns_that_may_be_cut_share_what_is_left() -> None:
    assert column_widths(
        [ID, ColumnSize(100, min_width=8, rank=1), ColumnSize(100, min_width=8, rank=2)], 80
    ) == [
        36,
        20,
        20,
    ]


def test_a_short_cell_leaves_its_share_to_the_others() -> None:
    assert column_widths([ColumnSize(100, min_width=8), ColumnSize(10, min_width=8)], 80) == [68, 10]


def test_the_highest_rank_is_dropped_first() -> None:
    columns = [ID, ColumnSize(20, rank=2), ColumnSize(20, rank=1), ColumnSize(20, rank=3)]
    assert column_widths(columns, 80) == [36, 20, 20, 0]
    assert column_widths(columns, 79) == [36, 0, 20, 0]


def test_an_id_is_never_cut_nor_dropped() -> None:
    assert column_widths([ID, ColumnSize(10, rank=1)], 20) == [36, 0]


shapes = st.lists(
    st.builds(ColumnSize, st.integers(1, 120), st.integers(0, 20), st.integers(0, 4)), min_size=1, max_size=8
)


@given(shapes, st.integers(1, 200))
def test_a_table_fits_or_its_columns_are_as_narrow_as_they_may_be(
    columns: list[ColumnSize], room: int
) -> None:
    given_ = column_widths(columns, room)
    kept = [i for i, width in enumerate(given_) if width]
    used = sum(given_) + GAP * (len(kept) - 1)
    for shape, width in zip(columns, given_, strict=True):
        assert width <= shape.natural
        if width and not shape.min_width:
            assert width == shape.natural
        elif width:
            assert width >= min(shape.min_width, shape.natural)
        else:
            assert shape.rank
    if used > room:
        assert all(columns[i].rank == 0 for i in kept)
        assert all(
            given_[i] == (min(columns[i].min_width, columns[i].natural) or columns[i].natural) for i in kept
        )
    elif any(given_[i] < columns[i].natural for i in kept):
        assert used == room
