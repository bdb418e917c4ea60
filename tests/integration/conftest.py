"""What several integration tests ask for: a database on each server, an installation on the broker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from deploy.local.database_tree import find_server, make_template
from services.common.database import engine_of
from services.common.migrations import migrate
from tests.integration.stage_kit import Kit
from tests.stack import Infra


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Infra]:
    """A MariaDB server for all tests of this run, and nothing else."""
    server = find_server("mariadb")
    if server is None:
        pytest.skip("MariaDB is not installed (Debian: mariadb-server-core)")
    make_template(server)
    # What is given is not started.
    given = {"POSTROAD_KAFKA_BOOTSTRAP": "127.0.0.1:1", "POSTROAD_DNS_SERVERS": "127.0.0.1:1"}
    given |= {"EMAIL_HOST": "127.0.0.1", "EMAIL_PORT": "1", "POSTROAD_LOCAL_DB": "mariadb"}
    servers = Infra(tmp_path_factory.mktemp("mariadb"), given)
    try:
        servers.up("--infra-only")
        yield servers
    finally:
        servers.down()


@pytest.fixture(params=["mysql", "mariadb"])
def server(request: pytest.FixtureRequest) -> Infra:
    """Each of the database servers in turn."""
    servers: Infra = request.getfixturevalue("infra" if request.param == "mysql" else "mariadb")
    return servers


@pytest.fixture
def database_url(server: Infra) -> str:
    """A migrated database of the test's own."""
    url = server.new_database()
    migrate(url)
    return url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a migrated database of the test's own."""
    engine = engine_of(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(params=["consumer", "classic"])
def kit(infra: Infra, request: pytest.FixtureRequest) -> Iterator[Kit]:
    """An installation of the test's own, under each group protocol in turn."""
    kit = Kit(infra, request.param)
    yield kit
    kit.close()


@pytest.fixture
def newest(infra: Infra) -> Iterator[Kit]:
    """An installation of the test's own, under KIP-848."""
    kit = Kit(infra, "consumer")
    yield kit
    kit.close()
