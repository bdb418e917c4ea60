"""Authenticates calls: by a bearer token (RFC 6750 section 2.1), or by the client's certificate."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
import structlog

from services.api.call import Metadata
from services.api.errors import StatusError, too_many_failed_attempts, unauthenticated
from services.api.failed_attempts import FailedAttempts, peer_address
from services.api.metrics import API_DENIED
from services.common.grants import (
    MIN_TOKEN_LENGTH,
    NAME,
    NAME_FORM,
    OPERATE,
    SCOPES,
    Grant,
    token_digest,
)

__all__ = ["ANYONE", "DEFAULT_TENANT", "Authenticator", "grants_of_pairs"]

log = structlog.get_logger(__name__)

DEFAULT_TENANT = "default"
ANYONE = Grant("", DEFAULT_TENANT, b"", frozenset(SCOPES))
"""What every call may do where the api needs neither tokens nor certificates."""
TENANT_SCOPES = frozenset(SCOPES) - {OPERATE}
"""What a token of POSTROAD_API_TOKENS, and a certificate, may do."""

# A header can carry visible ASCII. Spaces inside a token are accepted for compatibility.
_TOKEN = re.compile(r"[!-~](?:[ -~]{6,}[!-~])")
_TENANT_URI = re.compile(rf"postroad://tenant/({NAME.pattern})")
_MAX_HEADERS = 4096


class Authenticator:
    """Finds what a call may do. Belongs to one event loop.

    `fixed` are the grants of POSTROAD_API_TOKENS. With `file` there is a tokens file, whose grants `replace`
    sets. With `certificates` a client's certificate may name its tenant. Without all three every call is
    ANYONE's.
    """

    def __init__(
        self, fixed: Sequence[Grant] = (), *, file: bool = False, certificates: bool = False
    ) -> None:
        self._fixed, self._certificates = fixed, certificates
        self.is_open = not (fixed or file or certificates)
        """Whether a call needs neither a token nor a certificate."""
        self._failures = FailedAttempts()
        self._by_digest: dict[bytes, Grant] = {}
        # Calls repeat few headers, and a digest takes longer than all else here. A dictionary compares texts
        # only where their keyed hashes are equal, so its time reveals nothing either.
        self._by_header: dict[str | bytes, Grant] = {}
        self.replace(())

    def replace(self, grants: Iterable[Grant]) -> None:
        """Let these grants of the tokens file hold from now on, and no other one of the file."""
        # The keys are digests, so the time of a lookup reveals nothing about a token.
        self._by_digest = {grant.digest: grant for grant in (*grants, *self._fixed)}
        self._by_header = {}

    def authenticate(self, metadata: Metadata, context: grpc.aio.ServicerContext[Any, Any]) -> Grant:
        """Return what a call with this metadata may do.

        Raises StatusError UNAUTHENTICATED, and RESOURCE_EXHAUSTED for a peer that fails too often. A call
        that a token allows is never refused for its peer.
        """
        if self.is_open:
            return ANYONE
        found = self._by_header.get(metadata.get("authorization", ""))
        if found is not None and time.time() < found.not_after:
            return found
        try:
            return self._find(metadata, context)
        except StatusError as error:
            raise self._refusal(error, peer_address(context.peer() or "")) from None

    def is_current(self, grant: Grant) -> bool:
        """Return whether a grant still holds, with all its scopes. A connection's certificate always does."""
        if not grant.digest:
            return True
        present = self._by_digest.get(grant.digest)
        return (
            present is not None
            and present.tenant == grant.tenant
            and present.scopes >= grant.scopes
            and time.time() < present.not_after
        )

    def _find(self, metadata: Metadata, context: grpc.aio.ServicerContext[Any, Any]) -> Grant:
        if "authorization" in metadata.repeated:
            raise unauthenticated("TOKEN_UNKNOWN", "the metadata key authorization has two values")
        if "authorization" not in metadata:
            if self._certificates:
                return _grant_of_certificate(context.auth_context())
            raise unauthenticated("TOKEN_MISSING", "the metadata key authorization must be 'Bearer TOKEN'")
        header = metadata["authorization"]
        scheme, _, rest = str(header).partition(" ")
        token = rest.strip()
        found = self._by_digest.get(token_digest(token))
        if scheme.lower() != "bearer" or found is None or self._is_short(token, found):
            raise unauthenticated(
                "TOKEN_UNKNOWN",
                "the metadata key authorization must be 'Bearer TOKEN', with a token that the api knows",
            )
        if time.time() >= found.not_after:
            raise unauthenticated("TOKEN_ENDED", f"the time of the token {found.id} is over")
        if len(self._by_header) >= _MAX_HEADERS:
            self._by_header = {}
        self._by_header[header] = found
        return found

    def _is_short(self, token: str, found: Grant) -> bool:
        """Return whether a token of the file cannot have 128 bits."""
        return len(token) < MIN_TOKEN_LENGTH and found not in self._fixed

    def _refusal(self, error: StatusError, address: str) -> StatusError:
        wait = self._failures.count(address, time.monotonic())
        API_DENIED.labels(error.reason if not wait else "SLOWED_DOWN").inc()
        if not wait:
            return error
        return too_many_failed_attempts(wait)


def grants_of_pairs(tokens: str) -> list[Grant]:
    """Return the grants of POSTROAD_API_TOKENS: comma-separated `TENANT:TOKEN` pairs.

    A tenant may have several tokens, so an operator can replace one without an interruption.

    Raises ValueError for an empty list, a malformed pair, and a token of two tenants. The text never contains
    a token.
    """
    if not tokens.strip():
        # A file or a secret that is missing leaves an empty variable, and must not open the api.
        raise ValueError("has no pair; where it is unset, a client needs no token")
    grants: dict[bytes, Grant] = {}
    for number, pair in enumerate(map(str.strip, tokens.split(",")), start=1):
        tenant, colon, token = pair.partition(":")
        if not colon:
            raise ValueError(f"pair {number} is not TENANT:TOKEN, such as billing:4f1c09ab77d2")
        if NAME.fullmatch(tenant) is None:
            raise ValueError(f"the tenant of pair {number} is not {NAME_FORM}")
        if _TOKEN.fullmatch(token) is None:
            raise ValueError(f"the token of pair {number} is not 8 or more visible ASCII characters")
        digest = token_digest(token)
        if grants.setdefault(digest, Grant(f"pair-{number}", tenant, digest, TENANT_SCOPES)).tenant != tenant:
            raise ValueError(f"the token of pair {number} belongs to another tenant too")
    return list(grants.values())


def _grant_of_certificate(auth_context: Mapping[str, Iterable[bytes]]) -> Grant:
    """Return the grant of a connection by the one SAN `postroad://tenant/NAME` of the client's certificate.

    gRPC has verified the certificate. It lists the SANs of the type URI (RFC 5280 section 4.2.1.6) by
    themselves, so one of another type cannot pass for one of these.
    """
    uris = [uri.decode(errors="replace") for uri in auth_context.get("peer_uri", ())]
    tenants = [found[1] for found in map(_TENANT_URI.fullmatch, uris) if found]
    if len(tenants) != 1:
        raise unauthenticated(
            "TENANT_MISSING",
            "the client's certificate must have one URI postroad://tenant/NAME, or the call a bearer token",
        )
    return Grant(f"certificate of {tenants[0]}", tenants[0], b"", TENANT_SCOPES)
