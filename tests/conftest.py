"""Registers the fixtures for all tests, orders the tests, and ends all that a run started."""

import os

import pytest
import structlog

import tests.forms  # noqa: F401  (loads the profile of this run's form)
from tests import forked, reaper
from tests.order import pytest_collection_modifyitems, pytest_runtest_teardown
from tests.reaper import pytest_configure
from tests.stack import (
    breakable,
    breakable_mariadb,
    end_shared_servers,
    hold_stack,
    infra,
    mariadb,
    new_servers,
    new_stack,
    servers,
    stack,
)

__all__ = [
    "breakable",
    "breakable_mariadb",
    "hold_stack",
    "infra",
    "mariadb",
    "new_servers",
    "new_stack",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_runtest_teardown",
    "pytest_unconfigure",
    "servers",
    "stack",
]

# structlog would render each traceback by rich, with all local variables. That takes longer than most tests.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)
# The database's driver reads the public certificates anew for each connection, which takes longer than most
# of what a test then asks. No test needs them, and no process that it starts.
os.environ.update(SSL_CERT_FILE=os.devnull, SSL_CERT_DIR=os.devnull)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the servers that the workers shared, then whatever processes the tests left."""
    try:
        if not hasattr(config, "workerinput"):
            end_shared_servers()
    finally:
        forked.end()
        reaper.pytest_unconfigure(config)
