"""Only a process that may die makes the requests on which librdkafka can abort its process."""

from __future__ import annotations

import ast
from pathlib import Path

from confluent_kafka.admin import AdminClient

ROOT = Path(__file__).parents[2]
CHILD = ROOT / "services/common/kafka/describe_group.py"
# Each goes to a group's coordinator by librdkafka's admin API (issue 4605).
REQUESTS = {
    "alter_consumer_group_offsets",
    "delete_consumer_groups",
    "describe_consumer_groups",
    "list_consumer_group_offsets",
}


def _requests(path: Path) -> list[str]:
    found: list[str] = []
    text = path.read_text()
    if not any(name in text for name in REQUESTS):
        return found
    for node in ast.walk(ast.parse(text)):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
        if isinstance(name, str) and name in REQUESTS:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")  # type: ignore[attr-defined]
    return found


def test_requests_to_a_groups_coordinator_are_made_in_a_process_of_their_own() -> None:
    sources = [path for top in ("services", "deploy", "tests") for path in (ROOT / top).rglob("*.py")]
    others = set(sources) - {CHILD, Path(__file__)}
    assert len(others) > 200
    assert [line for path in sorted(others) for line in _requests(path)] == []
    assert _requests(CHILD) != []


def test_every_such_request_of_the_client_is_known() -> None:
    """A later version may add a request to a coordinator: then someone must look at it."""
    groups = {name for name in dir(AdminClient) if "group" in name and not name.startswith("_")}
    # These two ask every broker, not a coordinator.
    assert groups == REQUESTS | {"list_consumer_groups", "list_groups"}
