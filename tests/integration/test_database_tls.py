"""MySQL over TLS: by the URL alone, a client checks the server's certificate and its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url
from sqlalchemy.exc import DBAPIError

from services.common.database.engine import make_engine, url_of
from tests.certificates import Certificates, make_certificates
from tests.stack import Stack

HOST = "127.0.0.1"


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path, HOST)


@pytest.fixture
def url(new_servers: Callable[..., Stack], certificates: Certificates) -> URL:
    """The URL of a server that takes TLS alone, with these certificates."""
    # The stack starts nothing that a variable gives.
    stack = new_servers(
        POSTROAD_KAFKA_BOOTSTRAP="127.0.0.1:1",
        POSTROAD_DNS_SERVERS="127.0.0.1:1",
        EMAIL_HOST=HOST,
        EMAIL_PORT="1",
    )
    stack.up("--infra-only")
    found = make_url(stack.env()["POSTROAD_DATABASE_URL"])
    for name, path in (("ca", certificates.authority), ("server-cert", certificates.certificate),
                       ("server-key", certificates.key)):  # fmt: skip
        shutil.copy(path, stack.directory / "data/mysql" / f"{name}.pem")
    engine = make_engine(found)
    with engine.connect() as connection:
        connection.exec_driver_sql("ALTER INSTANCE RELOAD TLS")
        connection.exec_driver_sql("SET GLOBAL require_secure_transport = ON")
    engine.dispose()
    return found


def _cipher(url: URL, **query: str) -> str:
    """Return the cipher of a new session. Raises `sqlalchemy.exc.DBAPIError`."""
    engine = make_engine(url_of(url.update_query_dict(query).render_as_string(hide_password=False)))
    try:
        with engine.connect() as connection:
            return str(connection.exec_driver_sql("SHOW STATUS LIKE 'Ssl_cipher'").one()[1])
    finally:
        engine.dispose()


def test_the_url_has_the_certificate_verified(url: URL, certificates: Certificates, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    ours, other = str(certificates.authority), str(make_certificates(tmp_path / "other", HOST).authority)
    assert _cipher(url, ssl_ca=ours, ssl_verify_cert="true", ssl_verify_identity="true")
    assert _cipher(url, ssl_ca=ours, ssl_verify_identity="1", tls_versions="TLSv1.3")
    # The certificate does not name `localhost`.
    named = url.set(host="localhost")
    assert _cipher(named, ssl_ca=ours, ssl_verify_cert="true")
    refused = [
        (named, {"ssl_ca": ours, "ssl_verify_identity": "true"}),
        (url, {"ssl_ca": other, "ssl_verify_cert": "true"}),
        (url, {"ssl_ca": other, "ssl_verify_identity": "true"}),
        (url, {"ssl_verify_identity": "true"}),
        (url, {"ssl_disabled": "true"}),
    ]
    for to, query in refused:
        with pytest.raises(DBAPIError):
            _cipher(to, **query)


def test_a_truth_value_is_checked_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"^ssl_verify_identity must be true or false$"):
        url_of("mysql://u:p@h/x?ssl_verify_identity=perhaps")
