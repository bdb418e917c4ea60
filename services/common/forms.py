"""Checks the values of settings. Pure.

Each function returns the value, or raises ValueError with the accepted form.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from services.common.relay_headers import steers_a_relay

__all__ = [
    "MAX_DELAY",
    "addresses",
    "delays",
    "header_names",
    "helo",
    "host",
    "is_fqdn",
    "is_loopback",
    "kafka_security",
    "listen",
    "operator_token",
    "readable_file",
    "rising",
    "text",
    "token_url",
    "topic_prefix",
    "without_line_end",
]

MAX_DELAY = 30 * 86400
"""Seconds. Event topics keep their records no longer, so a rebuild would miss a task that waits longer."""

_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_PORT = re.compile(r"[0-9]{1,5}")
_SECONDS = re.compile(r"[0-9]{1,9}")
# Kafka limits a name to 249 characters. The prefix leaves space for Postroad's own names.
_PREFIX = re.compile(r"[A-Za-z0-9._-]{0,200}")
# RFC 5321 section 4.1.3: an address literal.
_LITERAL = re.compile(r"\[(?:(?i:IPv6):(?P<six>[^\]]+)|(?P<four>[^\]]+))\]")
# RFC 1123. A last label of digits alone would be an address.
_FQDN = re.compile(r"(?=.{4,253}\Z)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]*")
_VISIBLE = re.compile(r"[!-~]+")
# A host without a name of its own has one of these.
_NO_NAMES = ("localhost", "localdomain", "localdomain6")


def text(value: str) -> str:
    """Check that a value is UTF-8. Other bytes of the environment can be neither sent nor logged."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8") from None
    return value


def host(value: str) -> str:
    """Check a host name or an IP address, without a port."""
    if not _is_host(value):
        raise ValueError("must be a host name or an IP address, without a port")
    return value


def is_fqdn(value: str) -> bool:
    """Return whether a value is a fully qualified host name under which other hosts may know this one."""
    return _FQDN.fullmatch(value) is not None and value.lower().rpartition(".")[2] not in _NO_NAMES


def helo(value: str) -> str:
    """Check a name for EHLO: a full host name, an address literal, or empty for the host's own name."""
    literal = _LITERAL.fullmatch(value)
    if not value or is_fqdn(value):
        return value
    if literal:
        six, four = literal["six"], literal["four"]
        if _is_ip(ipaddress.IPv6Address, six) if six else _is_ip(ipaddress.IPv4Address, four):
            return value
    raise ValueError(
        "must be a full host name such as mail.example.org, or [192.0.2.1], or [IPv6:2001:db8::1]"
    )


def token_url(value: str) -> str:
    """Check the URL of a token. It gets a secret, so it must be https, or http to loopback."""
    if value and not _is_token_url(value):
        raise ValueError("must be a URL such as https://login.example.org/token")
    return value


def without_line_end(value: str) -> str:
    """Return a secret without the line end that a file or `echo` leaves."""
    return value.rstrip("\r\n")


def listen(value: str) -> str:
    """Check an address to listen on. Port 0 selects a free one."""
    if not _is_address(value, min_port=0):
        raise ValueError("must be host:port or [IPv6]:port, the port from 0 to 65535")
    return value


def addresses(value: str) -> str:
    """Check a comma-separated list of brokers. A broker without a port has Kafka's default one."""
    for broker in value.split(","):
        if not _is_address(broker.strip(), min_port=1) and not _is_host(broker.strip().strip("[]")):
            raise ValueError("must be host:port, comma separated, each port from 1 to 65535")
    return value


def topic_prefix(value: str) -> str:
    """Check the prefix of topic and group names."""
    if not _PREFIX.fullmatch(value):
        raise ValueError("must be at most 200 of A-Z, a-z, 0-9, '.', '_' and '-'")
    return value


def delays(value: str) -> tuple[int, ...]:
    """Return the seconds of a comma-separated list, which may be empty."""
    parts = [part.strip() for part in value.split(",")] if value.strip() else []
    if not all(map(_SECONDS.fullmatch, parts)):
        raise ValueError("must be whole seconds, comma separated, such as 60,300")
    return tuple(map(int, parts))


def header_names(value: str) -> tuple[str, ...]:
    """Return the header names of a comma-separated list, in lower case. The list may be empty."""
    names = tuple(name.strip().lower() for name in value.split(",")) if value.strip() else ()
    for name in names:
        if not steers_a_relay(name):
            raise ValueError("must be names of fields that steer a relay, comma separated, such as X-PM-Tag")
    return names


def operator_token(value: str) -> str:
    """Check the operators' token, which may be empty."""
    if value and (_VISIBLE.fullmatch(value) is None or len(value) < 16):
        raise ValueError("must be 16 or more visible ASCII characters")
    return value


def readable_file(value: str) -> str:
    """Check that a file can be read; empty: there is none. Blocks."""
    if value:
        try:
            Path(value).open("rb").close()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
    return value


def kafka_security(protocol: str, sasl: Mapping[str, object], tls: Mapping[str, object]) -> None:
    """Check that the settings of SASL and TLS, by their variables, are those that the protocol needs.

    The first two of `tls` are the client's certificate and its key.
    """
    by = "POSTROAD_KAFKA_SECURITY_PROTOCOL"
    if protocol.startswith("SASL") and (missing := [name for name, value in sasl.items() if not value]):
        raise ValueError(f"{missing[0]}: must be set where {by} is {protocol}")
    unused = {} if protocol.startswith("SASL") else dict(sasl)
    unused |= {} if protocol.endswith("SSL") else tls
    if given := [name for name, value in unused.items() if value]:
        raise ValueError(f"{given[0]}: must be empty where {by} is {protocol}")
    (certificate, has_certificate), (key, has_key) = list(tls.items())[:2]
    if bool(has_certificate) != bool(has_key):
        raise ValueError(f"{key}: must be set where {certificate} is, and only there")


def rising(value: Sequence[int]) -> None:
    """Check that delays (seconds) rise and are in the accepted range."""
    if list(value) != sorted(set(value)) or not all(0 < delay <= MAX_DELAY for delay in value):
        raise ValueError(f"must be from 1 to {MAX_DELAY} seconds, each longer than the one before")


def _is_host(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return _NAME.fullmatch(value) is not None
    return True


def _is_address(value: str, min_port: int) -> bool:
    name, _, port = value.rpartition(":")
    bracketed = name.startswith("[") and name.endswith("]")
    valid = _is_ip(ipaddress.IPv6Address, name[1:-1]) if bracketed else ":" not in name and _is_host(name)
    return valid and _PORT.fullmatch(port) is not None and min_port <= int(port) <= 65535


def _is_token_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    secure = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))
    return bool(host) and port != 0 and secure and _VISIBLE.fullmatch(value) is not None


def is_loopback(value: str) -> bool:
    """Return whether a host is this one: a loopback address or `localhost`."""
    try:
        return ipaddress.ip_address(value).is_loopback
    except ValueError:
        return value == "localhost"


def _is_ip(kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address], value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True
