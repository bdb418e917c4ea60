"""Bearer tokens (RFC 6750 section 2.1). Each belongs to one tenant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256

from services.api.errors import unauthenticated

__all__ = ["DEFAULT_TENANT", "Tenants"]

DEFAULT_TENANT = "default"
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# A header can carry visible ASCII. Spaces inside a token are accepted for compatibility.
_TOKEN = re.compile(r"[!-~](?:[ -~]{6,}[!-~])")


class Tenants:
    """Finds the tenant of a call by its bearer token.

    `tokens` holds comma-separated `TENANT:TOKEN` pairs. A tenant may have several tokens, so an operator can
    replace one without an interruption. With None every call belongs to the tenant `default`.

    Raises ValueError for an empty list, a malformed pair, and a token of two tenants. The text never contains
    a token.
    """

    def __init__(self, tokens: str | None) -> None:
        # The keys are digests, so the time of a lookup reveals nothing about a token.
        self._tenants: dict[bytes, str] = {}
        if tokens is not None and not tokens.strip():
            # A file or a secret that is missing leaves an empty variable, and must not open the api.
            raise ValueError("has no pair; where it is unset, a client needs no token")
        for number, pair in enumerate(map(str.strip, tokens.split(",") if tokens else ()), start=1):
            tenant, colon, token = pair.partition(":")
            if not colon:
                raise ValueError(f"pair {number} is not TENANT:TOKEN, such as billing:4f1c09ab77d2")
            if _TENANT.fullmatch(tenant) is None:
                raise ValueError(
                    f"the tenant of pair {number} is not 1 to 64 letters, digits, '.', '_' and '-'"
                    " that begin with a digit or letter"
                )
            if _TOKEN.fullmatch(token) is None:
                raise ValueError(f"the token of pair {number} is not 8 or more visible ASCII characters")
            if self._tenants.setdefault(_digest(token), tenant) != tenant:
                raise ValueError(f"the token of pair {number} belongs to another tenant too")

    @property
    def need_tokens(self) -> bool:
        """Whether a call needs a token."""
        return bool(self._tenants)

    def tenant(self, metadata: Mapping[str, str | bytes]) -> str:
        """Return the tenant of a call with this metadata; raise StatusError UNAUTHENTICATED without one."""
        if not self._tenants:
            return DEFAULT_TENANT
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        tenant = self._tenants.get(_digest(token.strip()))
        if scheme.lower() != "bearer" or tenant is None:
            raise unauthenticated()
        return tenant


def _digest(token: str) -> bytes:
    return sha256(token.encode()).digest()
