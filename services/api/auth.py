"""Bearer tokens (RFC 6750 section 2.1), each of one tenant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256

from services.api.errors import unauthenticated

__all__ = ["DEFAULT_TENANT", "Tenants"]

DEFAULT_TENANT = "default"
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What a client can put into a header; spaces within have always been taken.
_TOKEN = re.compile(r"[!-~](?:[ -~]{6,}[!-~])")


class Tenants:
    """Tells whose request it is.

    `tokens` is `TENANT:TOKEN` pairs, comma separated; a tenant may have several, so that one can be
    changed without a gap. Empty: everyone is the tenant `default`. Raises ValueError, without any
    token in its text, when a pair is none or a token stands for two tenants.
    """

    def __init__(self, tokens: str) -> None:
        # Found by its digest, so that the time of a look-up tells nothing about the tokens themselves.
        self._tenants: dict[bytes, str] = {}
        for place, pair in enumerate(map(str.strip, tokens.split(",") if tokens else ()), start=1):
            tenant, colon, token = pair.partition(":")
            if not colon:
                raise ValueError(f"pair {place} is no TENANT:TOKEN, such as billing:4f1c09ab77d2")
            if _TENANT.fullmatch(tenant) is None:
                raise ValueError(
                    f"the tenant of pair {place} is not 1 to 64 letters, digits, '.', '_' and '-'"
                    " that begin with a letter or a digit"
                )
            if _TOKEN.fullmatch(token) is None:
                raise ValueError(f"the token of pair {place} is not 8 or more visible ASCII characters")
            if self._tenants.setdefault(_digest(token), tenant) != tenant:
                raise ValueError(f"the token of pair {place} stands for another tenant too")

    def tenant(self, metadata: Mapping[str, str | bytes]) -> str:
        """Return the tenant of a request by its metadata; raise UNAUTHENTICATED where there is none."""
        if not self._tenants:
            return DEFAULT_TENANT
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        tenant = self._tenants.get(_digest(token.strip()))
        if scheme.lower() != "bearer" or tenant is None:
            raise unauthenticated()
        return tenant


def _digest(token: str) -> bytes:
    return sha256(token.encode()).digest()
