"""Orders the tests, and decides which of them run one after another on one worker."""

from __future__ import annotations

import zlib
from collections.abc import Generator

import pytest

from tests.forms import LONG

__all__ = ["pytest_collection_modifyitems", "pytest_runtest_teardown"]

# The long tests begin first, so that no worker is left alone with one at the end.
_FIRST = (
    "tests/chaos/test_chaos",
    "tests/e2e",
    "tests/integration/test_local_stack",
    "tests/integration/test_api_list",
    "tests/integration/test_api_watch",
    "tests/integration/test_stage",
    "tests/integration/test_re",
    "tests/integration",
    "tests/simulation",
)
# The fixtures of these modules cost more than several of their tests.
_TOGETHER = (
    "tests/e2e/test_documented_commands",
    "tests/integration/test_api_batch",
    "tests/integration/test_api_decisions",
    "tests/integration/test_api_list",
    "tests/integration/test_api_outbox",
    "tests/integration/test_api_requests",
    "tests/integration/test_api_watch",
    "tests/integration/test_fold_sql",
    "tests/integration/smtp/test_smtp_postfix",
    "tests/simulation/test_contract_mail",
)
# The longest chains. A whole system keeps a core busy, so run only a few more at once than there are cores.
_CHAINS = ("own_stack_1", "own_stack_2", "stack", "hold_stack", "breaks_servers")

# The fixtures of a session that the tests of one group alone use.
_GROUPS_SERVERS = ("stack", "hold_stack", "breakable", "breakable_mariadb")

# The short form runs these under the first variant only: the default protocol, MySQL. Other modules run both.
_FIRST_VARIANT = (
    "tests/integration/test_api_list",
    "tests/integration/test_rebuild",
    "tests/integration/test_stage_invariants",
)
_SECOND = {"kit": "classic", "server": "mariadb", "large": "mariadb"}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Put the long tests first, and name each test's group for `--dist loadgroup`.

    The short form leaves out second variants. The hook is a wrapper because pytest-xdist reads the groups in
    its own hook, which runs before any plain one.
    """
    if left_out := [] if LONG else [item for item in items if _is_second(item)]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _is_second(item)]
    groups = {item: group for item in items if (group := _group(item))}
    # Without the plugin, `--strict-markers` rejects the marker.
    if config.pluginmanager.has_plugin("xdist"):
        for item, group in groups.items():
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (groups.get(item) not in _CHAINS, _rank(item)))
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """End a group's servers with its last test, not with the worker: idle servers use the processor too."""
    yield
    # Without workers, the tests of a group do not follow each other.
    if not hasattr(item.config, "workerinput") or nextitem is None or _group(nextitem) == _group(item):
        return
    for name in _GROUPS_SERVERS:
        for definition in item.session._fixturemanager.getfixturedefs(name, item) or ():
            if definition.scope == "session":
                definition.finish(item._request)  # type: ignore[attr-defined]


def _is_second(item: pytest.Item) -> bool:
    if not item.nodeid.startswith(_FIRST_VARIANT):
        return False
    params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
    return any((params or {}).get(name) == second for name, second in _SECOND.items())


def _group(item: pytest.Item) -> str:
    if item.get_closest_marker("breaks_servers"):
        return "breaks_servers"
    fixtures = getattr(item, "fixturenames", ())
    if "new_servers" in fixtures:
        return f"own_stack_{1 + zlib.crc32(item.nodeid.encode()) % 2}"
    if together := next((start for start in _TOGETHER if item.nodeid.startswith(start)), ""):
        return together
    return next((system for system in ("stack", "hold_stack") if system in fixtures), "")


def _rank(item: pytest.Item) -> int:
    return next((n for n, start in enumerate(_FIRST) if item.nodeid.startswith(start)), len(_FIRST))
