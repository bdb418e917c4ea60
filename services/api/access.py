"""What the api reads of its tokens and certificates: at the start, and while it runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from services.api.auth import Authenticator, grants_of_pairs
from services.api.exposure import check_listener, is_local, log_exposure
from services.api.open_streams import OpenStreams
from services.api.reloaded_files import ReloadedFiles
from services.api.tls import check_paths, server_credentials, tls_files
from services.common.config import Settings, refused
from services.common.grants import Grant, parse_grants
from services.common.health import Degraded

__all__ = ["Access"]

_INTERVAL = 1.0
"""Seconds between two looks at the files. A change is used at the look after the one that finds it."""


class Access:
    """Who may call the api. Belongs to one event loop.

    Making it reads the files and blocks. Raises ValueError for settings that it cannot accept.
    """

    def __init__(self, settings: Settings) -> None:
        given = settings.model_fields_set
        fixed: list[Grant] = []
        with refused("api_tokens"):
            if "api_tokens" in given:
                fixed = grants_of_pairs(settings.api_tokens.get_secret_value())
        self._tokens = _tokens_file(settings.tokens_file) if "tokens_file" in given else None
        paths = [
            value if name in given else None
            for name, value in (
                ("tls_cert", settings.tls_cert),
                ("tls_key", settings.tls_key),
                ("tls_client_ca", settings.tls_client_ca),
            )
        ]
        tls, certificates = check_paths(*paths), paths[2] is not None
        with refused("tls_cert"):
            self._tls = tls_files(settings.tls_cert, settings.tls_key, paths[2]) if tls else None
        self.authenticator = Authenticator(fixed, file=self._tokens is not None, certificates=certificates)
        if self._tokens is not None:
            self.authenticator.replace(self._tokens.value)
        self.streams = OpenStreams(self.authenticator.is_current)
        self._listen = settings.listen
        with refused("listen"):
            check_listener(settings.listen, settings.insecure, tls=tls, is_open=self.authenticator.is_open)
        self.reflect = settings.reflection == "always" or (
            settings.reflection == "loopback" and is_local(settings.listen)
        )

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return the server's credentials; None without TLS."""
        if self._tls is None:
            return None
        return server_credentials(self._tls)

    def log(self) -> None:
        """Log what protects the listener."""
        log_exposure(self._listen, tls=self._tls is not None, is_open=self.authenticator.is_open)

    async def run(self) -> None:
        """Read files again that have changed, and end the streams of ended tokens, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL)
            if self._tls is not None:
                await asyncio.to_thread(self._tls.poll)
            if self._tokens is not None and await asyncio.to_thread(self._tokens.poll):
                self.authenticator.replace(self._tokens.value)
            self.streams.end_revoked()

    def problems(self) -> list[str]:
        """Return why a changed file is not used. Safe from any thread."""
        return [Degraded(files.problem) for files in (self._tls, self._tokens) if files and files.problem]


def _tokens_file(path: str) -> ReloadedFiles[list[Grant]]:
    def load() -> list[Grant]:
        try:
            return parse_grants(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    with refused("tokens_file"):
        if not path:
            raise ValueError("is empty; it must name a file, or be unset")
        found = ReloadedFiles([path], load)
        if not found.value:
            # Later an empty list is right: an operator has revoked the last token.
            raise ValueError(f"{path} has no token; `postroad token new` makes one")
    return found
