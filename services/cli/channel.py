"""The gRPC channel to the api."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grpc

from services.cli.errors import USAGE, Failure
from services.common.forms import without_line_end

__all__ = ["DEADLINE", "open_channel"]

DEADLINE = 20.0
"""Seconds that a command's call may take. The api itself gives up on its database after 4.5 s."""
_DEFAULT_TARGET = "127.0.0.1:50051"
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"", "0", "false", "no", "off"})
_MAX_MESSAGE_BYTES = 64 << 20


def open_channel(variables: Mapping[str, str]) -> grpc.Channel:
    """Return a channel to the api that these variables name. It connects with its first call. Raises Failure.

    With POSTROAD_TLS it checks the server's certificate against the system's root certificates. gRPC's own
    variable GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names others.
    """
    target = variables.get("POSTROAD_API") or _DEFAULT_TARGET
    host, colon, port = target.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise Failure(f"POSTROAD_API (--api) is {target!r}, no host:port", USAGE)
    tls = variables.get("POSTROAD_TLS", "").lower()
    if tls not in _TRUE | _FALSE:
        raise Failure(f"POSTROAD_TLS is {tls!r}, neither true nor false", USAGE)
    token = without_line_end(variables.get("POSTROAD_TOKEN", ""))
    if token and not all(" " <= character <= "~" for character in token):
        raise Failure("POSTROAD_TOKEN (--token) has other characters than visible ASCII", USAGE)
    options = [
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    # A watch may be silent for hours. Keepalive notices that its connection is dead.
    options += [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 10_000)]
    # The environment's proxy is for HTTP. Through it, gRPC reaches no loopback address.
    options.append(("grpc.enable_http_proxy", 0))
    if tls in _TRUE:
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(), options)
    else:
        channel = grpc.insecure_channel(target, options)
    return grpc.intercept_channel(channel, _BearerToken(token)) if token else channel


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _BearerToken(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the bearer token (RFC 6750) to every call."""

    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def _with_token(self, call: Any) -> _CallDetails:
        return _CallDetails(
            call.method,
            call.timeout,
            [*(call.metadata or ()), self._header],
            call.credentials,
            call.wait_for_ready,
            call.compression,
        )

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with_token(details), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with_token(details), request)
