"""Each service gets the settings that its code reads.

The tests compare the settings that the code of each service reads with those of compose.yaml and the local
stack.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from deploy.local.environment import OWN_SETTINGS, service_environment, services_reading
from deploy.local.state import SERVICES, StackState
from services.common.config import Settings, secret_variables, variable
from services.common.environment import OTHERS
from services.common.stages import STAGES

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "compose.yaml").read_text()

# compose.yaml does not need these: it has one broker, which talks in clear within its network, containers
# have names, and `stop_grace_period` fits the default times.
NOT_HANDED_ON = {
    "POSTROAD_REPLICATION",
    "POSTROAD_TOPIC_PREFIX",
    "POSTROAD_REPLICA",
    "POSTROAD_DRAIN_SECONDS",
    "POSTROAD_HANDOVER_SECONDS",
    "POSTROAD_REVOKE_SECONDS",
    *(variable(field) for field in Settings.model_fields if field.startswith(("kafka_s",))),
}

# The module and the name of a top-level definition.
Symbol = tuple[str, str]


class Module:
    """The top-level definitions of a module, and the modules that its names come from."""

    def __init__(self, name: str) -> None:
        path = ROOT / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        self.defined: dict[str, ast.stmt] = {}
        self.imported: dict[str, Symbol | str] = {}
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("services"):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    there = (ROOT / whole.replace(".", "/")).with_suffix(".py").exists()
                    there = there or (ROOT / whole.replace(".", "/")).is_dir()
                    self.imported[alias.asname or alias.name] = (
                        whole if there else (node.module or "", alias.name)
                    )
        for node in tree.body:
            for defined in _names(node):
                self.defined[defined] = node


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


module = cache(Module)


def _uses(symbol: Symbol) -> Iterator[Symbol]:
    """Yield the definitions that a definition uses, in its own module and in imported ones."""
    here = module(symbol[0])
    for node in ast.walk(here.defined[symbol[1]]):
        if isinstance(node, ast.Name):
            if node.id in here.defined:
                yield symbol[0], node.id
            elif isinstance(found := here.imported.get(node.id), tuple):
                yield found
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and isinstance(found := here.imported.get(node.value.id), str)
        ):
            yield found, node.attr


def _fields(symbol: Symbol) -> Iterator[str]:
    """Yield the fields of the settings that a definition reads."""
    if symbol == ("services.common.stages", "stage_delays"):
        yield from (stage.delays_setting for stage in STAGES.values() if stage.delays_setting)
    for node in ast.walk(module(symbol[0]).defined[symbol[1]]):
        if not isinstance(node, ast.Attribute):
            continue
        of = node.value
        name = of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else ""
        if name in ("settings", "_settings", "config"):
            # This property of the settings reads a field.
            yield "replica" if node.attr == "replica_name" else node.attr


# Most definitions serve several services.
uses, fields_read = cache(lambda symbol: [*_uses(symbol)]), cache(lambda symbol: [*_fields(symbol)])


def read_from(*roots: Symbol) -> set[str]:
    """Return the variables of the settings that these definitions read, and all that they use."""
    seen, todo = set[Symbol](), list(roots)
    while todo:
        symbol = todo.pop()
        known = symbol[0].startswith("services.") and symbol[1] in module(symbol[0]).defined
        if not known or symbol in seen or symbol[1] == "Settings":
            continue
        seen.add(symbol)
        todo += uses(symbol)
    fields = {field for symbol in seen for field in fields_read(symbol)}
    return {variable(field) for field in fields & set(Settings.model_fields)}


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def read_by(service: str) -> set[str]:
    """Return the variables that the process of a service, or a command of compose.yaml, reads."""
    if service == "migrate":
        return read_from(
            ("services.common.operations.database_url", "database_url"),
            ("services.common.migrations", "migrate"),
        )
    if service == "postroad":
        folders = (ROOT / "services/cli", ROOT / "services/common/operations")
        paths = [path for folder in folders for path in folder.rglob("*.py") if path.stem != "__init__"]
        names = [_dotted(path) for path in paths]
        return read_from(*((name, defined) for name in names for defined in module(name).defined))
    if service == "topics":
        return read_from(("services.common.kafka.admin", "apply"), ("services.common.stages", "all_topics"))
    main = "services.api" if service == "api" else STAGES[service].module
    if (ROOT / main.replace(".", "/")).is_dir():
        main = f"{main}.service"
    return read_from(("services.common.process", "main"), (main, "build"))


def given_to(service: str) -> set[str]:
    """Return the variables that compose.yaml gives to a service."""
    blocks = dict(re.findall(r"^x-\w+: &(\w+)\n((?:  .*\n)+)", COMPOSE, re.MULTILINE))
    [block] = re.findall(rf"^  {service}:\n((?:    .*\n|\n)+)", COMPOSE, re.MULTILINE)
    [(line, given)] = re.findall(r"^    environment:(.*)\n((?:      .*\n)*)", block, re.MULTILINE)
    for anchor in re.findall(r"\*(\w+)", line + "".join(re.findall("<<:.*", given))):
        given += blocks[anchor]
    return set(re.findall(r"^ +((?:POSTROAD|EMAIL)_\w+):", given, re.MULTILINE)) - OTHERS


def test_every_setting_has_a_reader() -> None:
    read = {name for service in (*SERVICES, "topics") for name in read_by(service)}
    assert read == {variable(field) for field in Settings.model_fields}


@pytest.mark.parametrize("service", [*SERVICES, "migrate", "topics", "postroad"])
def test_compose_gives_each_service_the_settings_that_it_reads(service: str) -> None:
    assert given_to(service) == read_by(service) - NOT_HANDED_ON


def test_a_service_of_the_local_stack_gets_no_secret_that_it_does_not_read() -> None:
    given = dict.fromkeys((*secret_variables(), *(f"{name}_FILE" for name in secret_variables())), "given")
    for service in SERVICES:
        got = set(service_environment(StackState(given=given), f"{service}-1"))
        for name in secret_variables():
            # The secret in a file takes the place of the stack's own.
            assert (name in read_by(service)) == (name in got) == (f"{name}_FILE" in got), (service, name)


@pytest.mark.parametrize("service", SERVICES)
def test_the_local_stack_gives_each_service_the_settings_that_it_reads(service: str) -> None:
    given = {variable(field): "given" for field in Settings.model_fields}
    state = StackState(given=given)
    assert read_by(service) <= set(service_environment(state, f"{service}-1"))


def test_the_settings_that_a_service_reads_are_found_exactly() -> None:
    assert "POSTROAD_BODY_RETENTION" in read_by("status")
    assert not {"POSTROAD_BODY_RETENTION", "POSTROAD_REPLICATION"} & read_by("api")
    assert {name for name in read_by("status") if name.startswith("EMAIL_")} == set()


def test_a_changed_setting_restarts_all_services_that_read_it() -> None:
    reads = {service: read_by(service) for service in SERVICES}
    for name in map(variable, Settings.model_fields):
        readers = {service for service in SERVICES if name in reads[service]}
        assert readers <= set(services_reading(name)), name
        if any(name.startswith(starts) for starts in OWN_SETTINGS.values()):
            assert readers == set(services_reading(name)), name
