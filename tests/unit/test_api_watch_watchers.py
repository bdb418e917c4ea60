"""Which tasks a watcher selects, and how the index finds its watchers."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postroad.v1 import events_pb2 as ev
from services.api.filters import Filter
from services.api.watch.watchers import Watcher, WatcherIndex, WatchSelection
from services.common.fold import TaskRow, delta
from tests.watch_changes import mail


def row_of(number: int, status: str = "pending", reason: str = "") -> TaskRow:
    return delta(ev.TaskCreated(task=mail(number)))._replace(status=status, reason=reason)


SELECTIONS = st.builds(
    WatchSelection,
    st.sampled_from(["default", "other"]),
    st.sampled_from([None, None, mail(0).id, mail(1).id]),
    st.builds(
        Filter,
        st.sampled_from([(), ("failed",), ("failed", "pending")]),
        st.sampled_from([None, None, "a0@x.test", "a1@x.test"]),
        st.sampled_from([None, None, "x.test", "y.test"]),
        st.sampled_from([None, None, "rejected"]),
        st.sampled_from([(), (("list", "news"),), (("list", "news"), ("n", "1")), (("list", "bills"),)]),
    ),
)


@given(st.lists(SELECTIONS, max_size=12), st.integers(0, 1), st.sampled_from(["pending", "failed"]))
def test_the_index_finds_each_matching_watcher_once(
    selections: list[WatchSelection], number: int, status: str
) -> None:
    async def found() -> None:
        index = WatcherIndex()
        watchers = [Watcher(selection, asyncio.timeout(None)) for selection in selections]
        for watcher in watchers:
            index.add(watcher)
        row = row_of(number, status, "rejected" if status == "failed" else "")
        hits = index.find(row)
        assert len(hits) == len(set(hits))
        assert set(hits) == {watcher for watcher in watchers if watcher.selection.matches(row)}
        assert set(index) == set(watchers)
        for watcher in watchers:
            index.remove(watcher)
        assert not index.find(row)

    asyncio.run(found())


@pytest.mark.parametrize(
    ("filter_", "matches"),
    [
        (Filter(), True),
        (Filter(status=("failed",)), True),
        (Filter(status=("pending", "completed")), False),
        (Filter(email="a1@x.test"), True),
        (Filter(email="A1@x.test"), False),
        (Filter(domain="x.test", reason="rejected"), True),
        (Filter(reason="expired"), False),
        (Filter(labels=(("list", "news"), ("n", "1"))), True),
        (Filter(labels=(("list", "news"), ("n", "2"))), False),
        (Filter(labels=(("lost", ""),)), False),
    ],
)
def test_a_filter_selects_what_list_selects(filter_: Filter, matches: bool) -> None:
    row = row_of(1, "failed", "rejected")
    assert WatchSelection("default", None, filter_).matches(row) is matches
    assert not WatchSelection("other", None, filter_).matches(row)
