"""Access tokens by OAuth's client credentials (RFC 6749 section 4.4), fetched over HTTPS and cached."""

import asyncio
import concurrent.futures
import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
    build_opener,
)

import structlog

from services.sender.masking import Mask, printable

__all__ = ["OAuthTokens", "TokenError"]

_log = structlog.get_logger(__name__)

R = TypeVar("R")

_MAX_ANSWER = 1 << 20
# A token's lifetime (seconds) if the server does not give it.
_LIFETIME = 300.0
# The part of a token's lifetime after which the client fetches another one.
_RENEW_AFTER = 0.8
# Seconds between two fetches of `run`. After a failure, `get` also fetches nothing for this long.
_RETRY_SECONDS = 1.0
_RETRY_SECONDS_MAX = 60.0


class TokenError(Exception):
    """There is no token. The text says why, without a secret."""


class OAuthTokens:
    """The access token of one client. Belongs to one event loop.

    Each fetch calls `secret`, so that a file may change. `trouble` says why the last fetch failed, also
    while an older token is still valid; None after a success. A fetch may take `timeout` seconds.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        secret: Callable[[], str],
        scope: str = "",
        *,
        timeout: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url, self._client_id, self._secret, self._scope = url, client_id, secret, scope
        self._timeout, self._clock = timeout, clock
        self._lock = asyncio.Lock()
        self._token: str | None = None
        self._expires = self._renew_at = float("-inf")
        self._failed_at = float("-inf")
        self.trouble: str | None = None

    async def get(self) -> str:
        """Return a valid token; fetch one if there is none.

        Raises:
            TokenError: the fetch failed.
        """
        async with self._lock:
            if self._token is None or self._clock() >= self._expires:
                if self.trouble is not None and self._clock() < self._failed_at + _RETRY_SECONDS:
                    raise TokenError(self.trouble)
                await self._fetch()
            assert self._token is not None
            return self._token

    def forget(self, token: str) -> None:
        """Drop this token, which the relay refused, so that `get` fetches another one."""
        if token == self._token:
            self._token = None

    async def run(self) -> None:
        """Renew the token ahead of its expiry, until cancelled."""
        pause = _RETRY_SECONDS
        while True:
            try:
                async with self._lock:
                    if self._token is None or self._clock() >= self._renew_at:
                        await self._fetch()
                pause = _RETRY_SECONDS
            except Exception:
                # The loop must go on, since nothing else renews the token; `trouble` has the error.
                pause = min(pause * 2, _RETRY_SECONDS_MAX)
            await asyncio.sleep(
                pause if self.trouble else max(self._renew_at - self._clock(), _RETRY_SECONDS)
            )

    async def _fetch(self) -> None:
        asked_at = self._clock()
        connections = _Connections()
        try:
            async with asyncio.timeout(self._timeout):
                token, lifetime = await _in_thread(lambda: self._ask(connections))
        except Exception as error:
            self._failed_at = self._clock()
            late = isinstance(error, TimeoutError)
            cause = f"no answer within {self._timeout:g} s" if late else str(error) or type(error).__name__
            if self.trouble is None:
                _log.warning("no OAuth token", error=cause)
            self.trouble = cause
            raise TokenError(cause) from None
        finally:
            connections.end()
        self._token, self.trouble = token, None
        self._expires = asked_at + lifetime
        self._renew_at = asked_at + lifetime * _RENEW_AFTER

    def _ask(self, connections: "_Connections") -> tuple[str, float]:
        """Return a token and its lifetime in seconds. Raises TokenError. Blocks."""
        secret = self._secret()
        try:
            return _parse_token(self._answer(secret, connections))
        except Exception as error:
            raise TokenError(printable(Mask(secret).text(str(error))) or type(error).__name__) from None

    def _answer(self, secret: str, connections: "_Connections") -> bytes:
        form = {"grant_type": "client_credentials", "client_id": self._client_id, "client_secret": secret}
        if self._scope:
            form["scope"] = self._scope
        request = Request(self._url, urlencode(form).encode(), {"Accept": "application/json"})
        try:
            with _opener(connections).open(request, timeout=self._timeout) as response:
                return bytes(response.read(_MAX_ANSWER))
        except HTTPError as error:
            raise TokenError(f"{error.code} {_error_description(error.read(_MAX_ANSWER))}") from None


class _NoRedirects(HTTPRedirectHandler):
    # The secret goes only to the URL of the setting.
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Connections:
    """The connections of one fetch. Ending them ends a thread's reads, also from a server that sends
    slowly."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._ended = False

    def add(self, connection: HTTPConnection) -> None:
        self._sockets.append(connection.sock)
        if self._ended:
            self.end()

    def end(self) -> None:
        self._ended = True
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                # SSLSocket's own shutdown would take the TLS state from the thread that reads.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _opener(connections: _Connections) -> OpenerDirector:
    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            connections.add(self)

    class Secure(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            connections.add(self)

    class Http(HTTPHandler):
        def http_open(self, request: Request) -> HTTPResponse:
            return self.do_open(Plain, request)

    class Https(HTTPSHandler):
        def https_open(self, request: Request) -> HTTPResponse:
            return self.do_open(Secure, request)

    return build_opener(Http, Https, _NoRedirects)


def _in_thread(work: Callable[[], R]) -> asyncio.Future[R]:
    """Run blocking work in a daemon thread: neither the loop's nor the process's end waits for it."""
    future: concurrent.futures.Future[R] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="oauth-token", daemon=True).start()
    return asyncio.wrap_future(future)


def _parse_token(raw: bytes) -> tuple[str, float]:
    try:
        answer = json.loads(raw)
    except ValueError:
        raise TokenError("the answer is not JSON") from None
    if not isinstance(answer, dict):
        raise TokenError("the answer is not a JSON object")
    token = answer.get("access_token")
    if not isinstance(token, str) or not token:
        raise TokenError("the answer has no access_token")
    lifetime = float(answer.get("expires_in") or _LIFETIME)
    if not 0 < lifetime < math.inf:
        raise TokenError(f"expires_in is {lifetime}")
    return token, lifetime


def _error_description(raw: bytes) -> str:
    """Return the error's description in the body of a response (RFC 6749 section 5.2)."""
    try:
        answer = json.loads(raw)
        return " ".join(str(answer[key]) for key in ("error", "error_description") if key in answer)
    except (ValueError, TypeError):
        return raw.decode("utf-8", "replace")
