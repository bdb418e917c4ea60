"""Every setting of Postroad, read from the environment.

A field of Settings has the default, the unit and the meaning of its setting. The README's table repeats them,
and a test compares the two.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AliasGenerator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from services.common import forms
from services.common.secret_files import SUFFIX, secrets_in_files

__all__ = [
    "SETTLE_SECONDS",
    "Settings",
    "file_secrets",
    "refusals",
    "refused",
    "secret_variables",
    "settings",
    "variable",
    "variables",
]

SETTLE_SECONDS = 20.0
"""The part of `handover_seconds` that the sender has to store the outcome, after the relay's reply."""


def _split(value: object) -> object:
    return forms.delays(value) if isinstance(value, str) else value


def _operator_token(value: SecretStr) -> SecretStr:
    forms.operator_token(value.get_secret_value())
    return value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _names(value: object) -> object:
    return forms.header_names(value) if isinstance(value, str) else value


def _rising(value: tuple[int, ...]) -> tuple[int, ...]:
    forms.rising(value)
    return value


Delays = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_split), AfterValidator(_rising)]
Host = Annotated[str, AfterValidator(forms.host)]
File = Annotated[str, AfterValidator(forms.readable_file)]
Listen = Annotated[str, AfterValidator(forms.listen)]

_CENTURY = 36_525 * 86400
# librdkafka accepts at most a day between two polls, which is three times revoke_seconds.
_HOUR = 3600
# Mails a second. The reciprocal is the time between two mails, and infinite for the smallest numbers.
_MIN_RATE = 0.0001


def _variable(field: str) -> str:
    """Return the name of a field's variable. Those of the relay have the prefix that other programs use."""
    return field.upper() if field.startswith("email_") else f"POSTROAD_{field.upper()}"


def _holds_secret(field: FieldInfo) -> bool:
    return field.annotation is SecretStr


class Settings(BaseSettings):
    """The settings of one process. Raises `pydantic.ValidationError` naming each invalid variable."""

    model_config = SettingsConfigDict(
        alias_generator=AliasGenerator(validation_alias=_variable),
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        allow_inf_nan=False,
    )

    kafka_bootstrap: Annotated[str, AfterValidator(forms.addresses)] = Field(
        "127.0.0.1:9092", description="Kafka brokers, host:port, comma separated"
    )
    kafka_security_protocol: Annotated[
        Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"], BeforeValidator(_upper)
    ] = Field(
        "PLAINTEXT", description="How clients connect to Kafka: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"
    )
    kafka_sasl_mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"], BeforeValidator(_upper)
    ] = Field("SCRAM-SHA-512", description="PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512")
    kafka_sasl_username: str = Field("", description="The user at Kafka, where the protocol has SASL")
    kafka_sasl_password: SecretStr = Field(SecretStr(""), description="The user's password")
    kafka_ssl_ca: File = Field(
        "", description="PEM file of the authorities that sign brokers' certificates; empty: the system's"
    )
    kafka_ssl_cert: File = Field("", description="PEM file with the client's certificate; empty: none")
    kafka_ssl_key: File = Field("", description="PEM file with the certificate's private key")
    kafka_ssl_key_password: SecretStr = Field(SecretStr(""), description="The private key's password")
    database_url: SecretStr = Field(
        SecretStr("mysql+mysqlconnector://postroad:postroad@127.0.0.1:3306/postroad"),
        description="SQLAlchemy URL of MySQL or MariaDB",
    )
    dns_servers: str = Field(
        "",
        description="DNS servers, host[:port], comma separated, asked in turn; empty: the system's resolver",
    )

    listen: Listen = Field("127.0.0.1:50051", description="Where the api serves gRPC, host:port")
    http_listen: Listen = Field(
        "127.0.0.1:0", description="Where a service answers /healthz, /readyz and /metrics"
    )
    operator_token: Annotated[SecretStr, AfterValidator(_operator_token)] = Field(
        SecretStr(""),
        description="Bearer token for problems and metrics at the HTTP port; empty: only this host sees them",
    )
    replica: str = Field(
        "",
        max_length=200,
        description="This replica's name in logs and at Kafka; empty: host name and process id",
    )
    log_format: Literal["json", "console"] = Field("json", description="How logs are written")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level logged"
    )

    partitions: int = Field(12, ge=1, le=100_000, description="Partitions of each topic, the same for all")
    replication: int = Field(
        1,
        ge=1,
        le=10_000,
        description="Replicas of each partition; min.insync.replicas is one less, at least 1",
    )
    topic_prefix: Annotated[str, AfterValidator(forms.topic_prefix)] = Field(
        "", description="Prefix of topic and group names, so that installations can share a cluster"
    )
    group_protocol: Literal["consumer", "classic"] = Field(
        "consumer", description="Kafka group protocol: consumer (KIP-848, Kafka 4 and later) or classic"
    )
    max_in_flight: int = Field(2000, ge=1, description="Records a stage holds at most")
    max_in_flight_bytes: int = Field(
        32 << 20,
        ge=1,
        description="Bytes of records a stage holds at most, besides up to 12 MiB that its client fetched",
    )
    revoke_seconds: float = Field(
        10.0, gt=0, le=_HOUR, description="How long a revoked partition waits for what is in flight"
    )
    drain_seconds: float = Field(
        20.0, gt=0, le=_HOUR, description="How long SIGTERM waits for what is in flight"
    )
    handover_seconds: float = Field(
        620.0,
        gt=SETTLE_SECONDS,
        le=_HOUR,
        description="Seconds for a handed-over mail, of which the last 20 are to store the outcome after the"
        " reply; a drain waits as long",
    )

    max_body: int = Field(512 << 10, ge=1, le=2 << 20, description="Bytes of text and HTML a task may have")
    body_retention: int = Field(
        30 * 86400,
        ge=0,
        le=_CENTURY,
        description="Seconds that the bodies of ended tasks are kept in MySQL; 0: forever",
    )
    max_pending_creates: int = Field(
        5000,
        ge=1,
        description="Single Creates that may wait for MySQL, and, counted apart, tasks of batches;"
        " more are refused",
    )
    api_tokens: SecretStr = Field(
        SecretStr(""),
        description="Bearer tokens as TENANT:TOKEN pairs, comma separated, for small set-ups;"
        " unset, without POSTROAD_TOKENS_FILE and POSTROAD_TLS_CLIENT_CA: a client needs no token",
    )
    tokens_file: str = Field(
        "",
        description="A file with a line for each token: who may do what, until when;"
        " the api reads it again when it changes",
    )
    tls_cert: str = Field(
        "", description="A PEM file: the api's certificate and those between it and the authority"
    )
    tls_key: str = Field("", description="A PEM file: the key of POSTROAD_TLS_CERT, without a password")
    tls_client_ca: str = Field(
        "", description="A PEM file: every client needs a certificate that one of these authorities signed"
    )
    reflection: Literal["loopback", "always", "never"] = Field(
        "loopback",
        description="Whether the api describes its services to clients such as grpcurl;"
        " loopback: if it listens there only",
    )
    token_keys: SecretStr = Field(
        SecretStr(""),
        description="Keys of page and resume tokens, comma separated, 32 ASCII characters or more;"
        " the first signs; empty: one made of the database's password",
    )
    allowed_headers: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)] = Field(
        (),
        description="Header fields that may steer a relay and that clients may set, comma separated,"
        " such as X-PM-Tag",
    )
    accept_compression: bool = Field(
        False, description="1: the api accepts compressed requests, of which a small one may become 32 MiB"
    )
    insecure: bool = Field(
        False, description="1: the api may listen wider than loopback without TLS or without tokens"
    )

    validator_delays: Delays = Field(
        (5, 30, 120, 600),
        description="Seconds before each further DNS attempt, each used once; empty: no further one",
    )
    dns_timeout: float = Field(
        5.0, gt=0, le=_HOUR, description="Seconds that all DNS queries about one domain may take"
    )
    sender_delays: Delays = Field(
        (60, 300, 900, 3600, 14400),
        min_length=1,
        description="Seconds before each further SMTP attempt; the last one repeats",
    )
    sender_max_age: int = Field(
        4 * 86400,
        ge=1,
        le=_CENTURY,
        description="Seconds after which a task is not sent any more and fails as expired",
    )
    on_uncertain: Literal["resend", "hold"] = Field(
        "resend",
        description="A mail that may have gone out: resend it (same Message-ID) or hold it as uncertain",
    )
    max_resends: int = Field(
        1,
        ge=0,
        le=1000,
        description="How often a mail that may have gone out is sent again before its task is uncertain",
    )
    sender_sessions: int = Field(
        20, ge=1, description="SMTP sessions that each sender replica keeps open at most"
    )
    domain_concurrency: int = Field(
        15,
        ge=0,
        description="SMTP sessions that each sender replica uses for one recipient domain at most;"
        " at or above POSTROAD_SENDER_SESSIONS: three quarters of those; 0: no limit",
    )
    domain_rate: float = Field(
        0.0,
        ge=0,
        description="Mails a second that each sender replica begins to one recipient domain at most; 0: any",
    )
    lease_seconds: float = Field(
        20.0, gt=1, le=_HOUR, description="How long a sender's claim on a task holds unless renewed"
    )

    email_host: Host = Field("127.0.0.1", description="The relay that takes the mail")
    email_port: int = Field(25, description="The relay's port", ge=1, le=65535)
    email_helo: Annotated[str, AfterValidator(forms.helo)] = Field(
        "",
        description="The sender's name at EHLO; empty: the host's full name, else its address",
    )
    email_user: str = Field("", description="User name at the relay; empty: no AUTH")
    email_pass: SecretStr = Field(SecretStr(""), description="Password at the relay")
    email_auth: Literal["auto", "plain", "login", "xoauth2"] = Field(
        "auto",
        description="How the sender authenticates: plain, login, xoauth2 (by EMAIL_OAUTH_...),"
        " or auto: plain, then login",
    )
    email_oauth_token_url: Annotated[str, AfterValidator(forms.token_url)] = Field(
        "", description="Where xoauth2 fetches its access tokens, by client credentials"
    )
    email_oauth_client_id: str = Field("", description="The client's id there")
    email_oauth_client_secret: SecretStr = Field(SecretStr(""), description="The client's secret")
    email_oauth_client_secret_file: str = Field(
        "", description="A file with the secret, read at each fetch, in place of EMAIL_OAUTH_CLIENT_SECRET"
    )
    email_oauth_scope: str = Field(
        "", description="The requested scope, such as https://outlook.office365.com/.default"
    )
    email_tls: Literal["", "implicit", "starttls", "opportunistic", "none"] = Field(
        "",
        description="implicit, starttls (required), opportunistic (starttls if EMAIL_USER is set) or none; "
        "empty: none on loopback, else starttls",
    )
    email_from: str = Field(
        "Postroad <postroad@localhost>",
        description="The From mailbox, whose address is the envelope's too;"
        " a name with a comma or the like stands in double quotes",
    )

    @property
    def replica_name(self) -> str:
        """This replica's name in logs and at Kafka, where `postroad lag` shows it."""
        return self.replica or f"{socket.gethostname()}-{os.getpid()}"

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        return forms.text(value) if isinstance(value, str) else value

    @field_validator("*", mode="before")
    @classmethod
    def _without_line_end(cls, value: object, info: ValidationInfo) -> object:
        secret = info.field_name is not None and _holds_secret(cls.model_fields[info.field_name])
        return forms.without_line_end(value) if secret and isinstance(value, str) else value

    @field_validator("email_auth", mode="before")
    @classmethod
    def _is_mechanism(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _kafkas_settings_agree(self) -> Settings:
        forms.kafka_security(
            self.kafka_security_protocol,
            {_variable(name): getattr(self, name) for name in ("kafka_sasl_username", "kafka_sasl_password")},
            {
                _variable(name): getattr(self, name)
                for name in ("kafka_ssl_cert", "kafka_ssl_key", "kafka_ssl_key_password", "kafka_ssl_ca")
            },
        )
        return self

    @field_validator("domain_rate")
    @classmethod
    def _not_too_slow(cls, value: float) -> float:
        if 0 < value < _MIN_RATE:
            raise ValueError(f"must be 0 or at least {_MIN_RATE}")
        return value


# The sender reads the OAuth client's file again at each fetch, so that one has a setting of its own.
_FILE_SECRETS = [
    name
    for name, field in Settings.model_fields.items()
    if _holds_secret(field) and f"{name}_file" not in Settings.model_fields
]


def variable(field: str) -> str:
    """Return the environment variable of a field of Settings."""
    return str(Settings.model_fields[field].validation_alias)


def variables() -> list[str]:
    """Return the variables of all settings, with those that name a secret's file."""
    plain = [variable(field) for field in Settings.model_fields]
    return [*plain, *(name + SUFFIX for name in secret_variables())]


def secret_variables() -> list[str]:
    """Return the variables of the secrets that a process reads from a file at its start."""
    return [variable(field) for field in _FILE_SECRETS]


def file_secrets(given: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets whose files these variables name, by their fields of Settings.

    Blocks. Raises ValueError, which names the variable.
    """
    found = secrets_in_files(given, secret_variables())
    return {field: found[variable(field)] for field in _FILE_SECRETS if variable(field) in found}


def refusals(error: ValidationError) -> list[str]:
    """Return a line for each invalid setting: its variable and the accepted form, never its value."""
    named = {variable(field): variable(field) for field in Settings.model_fields}
    named |= {field: variable(field) for field in Settings.model_fields}
    return [
        # Where two settings disagree, the text itself names them.
        (f"{named[str(problem['loc'][0])]}: " if problem["loc"] else "")
        + problem["msg"].removeprefix("Value error, ")
        for problem in error.errors(include_input=False)
    ]


@contextmanager
def refused(field: str) -> Iterator[None]:
    """Add the variable of this setting to a ValueError that the `with` block raises."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{variable(field)}: {error}") from error


@cache
def settings() -> Settings:
    """Return this process's settings, read once.

    Blocks. Raises `pydantic.ValidationError`, and ValueError for a secret's file; both name the variable.
    """
    return Settings(**file_secrets(os.environ))  # type: ignore[arg-type]
