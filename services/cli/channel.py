"""The gRPC channel to the api."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grpc

from services.cli.errors import USAGE, Failure
from services.common.forms import without_line_end

__all__ = ["DEADLINE", "open_channel"]

DEADLINE = 20.0
"""Seconds that a call of a command may take; the api itself gives up on its database after 4.5."""
DEFAULT = "127.0.0.1:50051"
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"", "0", "false", "no", "off"})
_MOST_BYTES = 64 << 20


def open_channel(values: Mapping[str, str]) -> grpc.Channel:
    """Return a channel to the api that these variables name.

    It connects on its first call. With POSTROAD_TLS the server's certificate is checked against the system's
    roots (gRPC's own variable GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names others).
    """
    target = values.get("POSTROAD_API") or DEFAULT
    host, colon, port = target.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise Failure(f"POSTROAD_API (--api) is {target!r}, no host:port", USAGE)
    wanted = values.get("POSTROAD_TLS", "").lower()
    if wanted not in _TRUE | _FALSE:
        raise Failure(f"POSTROAD_TLS is {wanted!r}, neither true nor false", USAGE)
    token = without_line_end(values.get("POSTROAD_TOKEN", ""))
    if token and not all(" " <= character <= "~" for character in token):
        raise Failure("POSTROAD_TOKEN (--token) has other characters than visible ASCII", USAGE)
    options = [("grpc.max_receive_message_length", _MOST_BYTES), ("grpc.max_reconnect_backoff_ms", 1000)]
    # A watch may be silent for hours: its connection is asked after, so that a dead one is noticed.
    options += [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 10_000)]
    # A proxy of the environment is for HTTP; a loopback address behind one is not reached.
    options.append(("grpc.enable_http_proxy", 0))
    if wanted in _TRUE:
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(), options)
    else:
        channel = grpc.insecure_channel(target, options)
    return grpc.intercept_channel(channel, _Bearer(token)) if token else channel


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Bearer(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Puts the token (RFC 6750) on every call."""

    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def _with(self, call: Any) -> _Details:
        return _Details(
            call.method,
            call.timeout,
            [*(call.metadata or ()), self._header],
            call.credentials,
            call.wait_for_ready,
            call.compression,
        )

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with(details), request)

    def intercept_unary_stream(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(self._with(details), request)
