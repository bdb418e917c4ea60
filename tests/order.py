"""The order of the tests, and which of them may not overlap."""

from __future__ import annotations

import pytest

__all__ = ["pytest_collection_modifyitems"]

# Where the long tests are: they begin first, so that no worker is left alone with one at the end.
_FIRST = ("tests/chaos/test_chaos", "tests/e2e", "tests/integration", "tests/simulation")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long tests first, and those that share what they break onto one worker each (`loadgroup`)."""
    items.sort(key=_rank)
    for item in items:
        if item.get_closest_marker("breaks_servers"):
            item.add_marker(pytest.mark.xdist_group("breaks_servers"))
        elif "stack" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("stack"))


def _rank(item: pytest.Item) -> int:
    return next((n for n, start in enumerate(_FIRST) if item.nodeid.startswith(start)), len(_FIRST))
