"""How clients prove themselves to Kafka, and check its brokers."""

from __future__ import annotations

from services.common.config import Settings

__all__ = ["security_config"]


def security_config(settings: Settings) -> dict[str, str]:
    """Return librdkafka's settings for TLS and SASL; empty for a cluster in clear.

    A client checks the brokers' certificates, and that they name the broker's host: librdkafka's default.
    The settings hold the password, so they go to another process by a pipe and never as an argument.
    """
    protocol = settings.kafka_security_protocol
    if protocol == "PLAINTEXT":
        return {}
    config = {
        "security.protocol": protocol.lower(),
        "ssl.ca.location": settings.kafka_ssl_ca,
        "ssl.certificate.location": settings.kafka_ssl_cert,
        "ssl.key.location": settings.kafka_ssl_key,
        "ssl.key.password": settings.kafka_ssl_key_password.get_secret_value(),
    }
    if protocol.startswith("SASL"):
        config |= {
            "sasl.mechanism": settings.kafka_sasl_mechanism,
            "sasl.username": settings.kafka_sasl_username,
            "sasl.password": settings.kafka_sasl_password.get_secret_value(),
        }
    return {name: value for name, value in config.items() if value}
