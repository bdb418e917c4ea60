"""The gRPC channel to the api."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from services.cli.errors import USAGE, Failure
from services.common.forms import is_loopback, without_line_end
from services.common.grants import NAME, NAME_FORM

__all__ = ["DEADLINE", "open_channel"]

DEADLINE = 20.0
"""Seconds that a command's call may take. The api itself gives up on its database after 4.5 s."""
_DEFAULT_TARGET = "127.0.0.1:50051"
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"", "0", "false", "no", "off"})
_MAX_MESSAGE_BYTES = 64 << 20


def open_channel(variables: Mapping[str, str]) -> grpc.Channel:
    """Return a channel to the api that these variables name. It connects with its first call. Raises Failure.

    With POSTROAD_TLS it checks the server's certificate against POSTROAD_CA, or else against the system's
    root certificates. gRPC's own variable GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names others. POSTROAD_CA and
    POSTROAD_CERT demand TLS by themselves.
    """
    target = variables.get("POSTROAD_API") or _DEFAULT_TARGET
    host, colon, port = target.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise Failure(f"POSTROAD_API (--api) is {target!r}, no host:port", USAGE)
    credentials = _tls_credentials(variables)
    token = without_line_end(variables.get("POSTROAD_TOKEN", ""))
    if token and not all(" " <= character <= "~" for character in token):
        raise Failure("POSTROAD_TOKEN (--token) has other characters than visible ASCII", USAGE)
    in_clear = _is_true(variables, "POSTROAD_TOKEN_IN_CLEAR", "--token-in-clear")
    if token and credentials is None and not in_clear and not is_loopback(host.strip("[]")):
        raise Failure(
            f"a token would go to {target} in clear: use TLS (--tls or --ca), or --token-in-clear where you"
            " trust the network",
            USAGE,
        )
    metadata = [("authorization", f"Bearer {token}")] if token else []
    if tenant := variables.get("POSTROAD_TENANT"):
        if NAME.fullmatch(tenant) is None:
            raise Failure(f"POSTROAD_TENANT (--tenant) is not {NAME_FORM}", USAGE)
        metadata.append(("postroad-tenant", tenant))
    options = [
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    # A watch may be silent for hours. Keepalive notices that its connection is dead.
    options += [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 10_000)]
    # The environment's proxy is for HTTP. Through it, gRPC reaches no loopback address.
    options.append(("grpc.enable_http_proxy", 0))
    if credentials is None:
        channel = grpc.insecure_channel(target, options)
    else:
        channel = grpc.secure_channel(target, credentials, options)
    return grpc.intercept_channel(channel, _Metadata(metadata)) if metadata else channel


def _tls_credentials(variables: Mapping[str, str]) -> grpc.ChannelCredentials | None:
    """Return the credentials that these variables ask for; None for plain text. Raises Failure."""
    names = {"POSTROAD_CA": "--ca", "POSTROAD_CERT": "--cert", "POSTROAD_KEY": "--key"}
    files = {name: variables[name] for name in names if variables.get(name)}
    tls = _is_true(variables, "POSTROAD_TLS", "--tls")
    if not files:
        return grpc.ssl_channel_credentials() if tls else None
    if variables.get("POSTROAD_TLS") and not tls:
        name = next(iter(files))
        raise Failure(f"{name} ({names[name]}) is for TLS, which POSTROAD_TLS (--no-tls) forbids", USAGE)
    if ("POSTROAD_CERT" in files) != ("POSTROAD_KEY" in files):
        raise Failure("POSTROAD_CERT (--cert) and POSTROAD_KEY (--key) need each other", USAGE)
    found = {name: _read(f"{name} ({names[name]})", path) for name, path in files.items()}
    return grpc.ssl_channel_credentials(
        found.get("POSTROAD_CA"), found.get("POSTROAD_KEY"), found.get("POSTROAD_CERT")
    )


def _is_true(variables: Mapping[str, str], name: str, flag: str) -> bool:
    value = variables.get(name, "").lower()
    if value not in _TRUE | _FALSE:
        raise Failure(f"{name} ({flag}) is {value!r}, neither true nor false", USAGE)
    return value in _TRUE


def _read(named: str, path: str) -> bytes:
    """Return the content of a PEM file. What gRPC cannot use, it would only report as a lost connection."""
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise Failure(f"{named}: {path}: {error.strerror or error}", USAGE) from None
    if b"-----BEGIN " not in content:
        raise Failure(f"{named}: {path} has nothing in PEM", USAGE)
    return content


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Metadata(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds metadata to every call: the bearer token (RFC 6750), and the tenant that an operator names."""

    def __init__(self, metadata: Sequence[tuple[str, str]]) -> None:
        self._metadata = metadata

    def _with_metadata(self, call: Any) -> _CallDetails:
        return _CallDetails(
            call.method,
            call.timeout,
            [*(call.metadata or ()), *self._metadata],
            call.credentials,
            call.wait_for_ready,
            call.compression,
        )

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with_metadata(details), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with_metadata(details), request)
