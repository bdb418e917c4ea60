"""The order of the tests, and which of them run one after another on one worker."""

from __future__ import annotations

from collections.abc import Generator

import pytest

__all__ = ["pytest_collection_modifyitems"]

# The long tests begin first, so that no worker is left alone with one at the end.
_FIRST = (
    "tests/chaos/test_chaos",
    "tests/e2e",
    "tests/integration/test_local_stack",
    "tests/integration/test_stage",
    "tests/integration/test_re",
    "tests/integration",
    "tests/simulation",
)
# What their modules' fixtures prepare costs more than several of their tests.
_TOGETHER = (
    "tests/e2e/test_replay",
    "tests/integration/test_api_list",
    "tests/integration/test_api_requests",
    "tests/integration/test_fold_sql",
    "tests/integration/smtp/test_smtp_postfix",
)
# The longest chains. A whole system keeps both cores busy: as many at once as there are cores are enough.
_CHAINS = ("own_stack", "stack", "breaks_servers")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Put the long tests first; name the group that a test belongs to, for `--dist loadgroup`.

    A wrapper: pytest-xdist reads the groups in its own hook, which it has called before any plain one.
    """
    groups = {item: group for item in items if (group := _group(item))}
    # Without its plugin the marker is unknown, which `--strict-markers` makes an error.
    if config.pluginmanager.has_plugin("xdist"):
        for item, group in groups.items():
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (groups.get(item) not in _CHAINS, _rank(item)))
    yield


def _group(item: pytest.Item) -> str:
    if item.get_closest_marker("breaks_servers"):
        return "breaks_servers"
    fixtures = getattr(item, "fixturenames", ())
    if "new_servers" in fixtures:
        return "own_stack"
    if "stack" in fixtures:
        return "stack"
    return next((start for start in _TOGETHER if item.nodeid.startswith(start)), "")


def _rank(item: pytest.Item) -> int:
    return next((n for n, start in enumerate(_FIRST) if item.nodeid.startswith(start)), len(_FIRST))
