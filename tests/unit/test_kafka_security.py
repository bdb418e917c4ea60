"""Every client gets the settings of TLS and SASL; no other process sees the password in its arguments."""

import os
from pathlib import Path

import pytest

from services.common.config import Settings
from services.common.kafka import group_request
from services.common.kafka.admin import operator_config
from services.common.kafka.clients import consumer_config, plain_config, producer_config

ROOT = Path(__file__).parents[2]
SECURE = Settings(
    kafka_security_protocol="SASL_SSL",
    kafka_sasl_username="postroad-api",
    kafka_sasl_password="s3cret",  # type: ignore[arg-type]
    kafka_ssl_ca=os.devnull,
    kafka_ssl_cert=os.devnull,
    kafka_ssl_key=os.devnull,
)
WANTED = {
    "security.protocol": "sasl_ssl",
    "sasl.mechanism": "SCRAM-SHA-512",
    "sasl.username": "postroad-api",
    "sasl.password": "s3cret",
    "ssl.ca.location": os.devnull,
    "ssl.certificate.location": os.devnull,
    "ssl.key.location": os.devnull,
}


def test_every_client_is_secure() -> None:
    for config in (
        plain_config(SECURE, "x"),
        consumer_config(SECURE, "status", "x", gather=True),
        producer_config(SECURE, "x"),
        operator_config(SECURE),
    ):
        assert config.items() >= WANTED.items()
        # The default is to check the broker's certificate and name.
        assert not [name for name in config if "verification" in name or "identification" in name]


def test_a_cluster_in_clear_needs_no_setting() -> None:
    assert not [
        name for name in plain_config(Settings(), "x") if name.startswith(("sasl", "ssl", "security"))
    ]


def test_only_these_places_name_the_brokers() -> None:
    naming = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "services").rglob("*.py")
        if '"bootstrap.servers"' in path.read_text()
    }
    assert naming == {"services/common/kafka/clients.py", "services/common/kafka/admin.py"}


def test_the_process_that_describes_groups_gets_no_secret_as_an_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []
    popen = group_request.subprocess.Popen

    def start(argv: list[str], **options: object) -> object:
        started.append(argv)
        return popen(argv, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(group_request.subprocess, "Popen", start)
    with group_request.GroupRequest(plain_config(SECURE, "x"), ["g"], 0.1):
        pass
    assert started
    assert "s3cret" not in str(started)
