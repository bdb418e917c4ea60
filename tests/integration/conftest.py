"""What several integration tests ask for: a database on each server, an installation on the broker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from services.common.database.engine import make_engine
from tests.integration.stage_kit import Kit
from tests.stack import Infra


@pytest.fixture(params=["mysql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Infra:
    """Each of the database servers in turn; a test marked `breaks_servers` has one that it may break."""
    breaks = request.node.get_closest_marker("breaks_servers")
    fixture = {"mysql": "servers", "mariadb": "breakable_mariadb" if breaks else "mariadb"}[request.param]
    servers: Infra = request.getfixturevalue(fixture)
    return servers


@pytest.fixture
def database_url(server: Infra) -> str:
    """A migrated database of the test's own."""
    return server.migrated_database()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a migrated database of the test's own."""
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(params=["consumer", "classic"])
def kit(servers: Infra, request: pytest.FixtureRequest) -> Iterator[Kit]:
    """An installation of the test's own, under each group protocol in turn."""
    kit = Kit(servers, request.param)
    yield kit
    kit.close()


@pytest.fixture
def newest(servers: Infra) -> Iterator[Kit]:
    """An installation of the test's own, under KIP-848."""
    kit = Kit(servers, "consumer")
    yield kit
    kit.close()
