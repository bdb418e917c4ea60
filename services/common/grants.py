"""What a token allows, and the file that says it for each token. Pure.

A line of the file is a grant: five fields with spaces between them.

    # id      tenant   SHA-256 of the token (64 hexadecimal digits)    scopes       not after
    6f1c22d0  billing  9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b..  create,read  2027-01-31T00:00:00Z

The file may have empty lines and comments, which begin with `#`. A `-` as the last field stands for no end.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final, NamedTuple

__all__ = [
    "CANCEL",
    "CONTENT",
    "CREATE",
    "MIN_TOKEN_LENGTH",
    "NAME",
    "NAME_FORM",
    "OPERATE",
    "READ",
    "SCOPES",
    "Grant",
    "format_grant",
    "parse_grants",
    "parse_scopes",
    "token_digest",
]

CREATE, READ, CANCEL, OPERATE, CONTENT = "create", "read", "cancel", "operate", "content"
SCOPES: Final = (CREATE, READ, CANCEL, OPERATE, CONTENT)
"""All scopes, in the order in which they are shown."""
MIN_TOKEN_LENGTH: Final = 22
"""Characters of a token whose digest is in the file: fewer hold no 128 bits in base64."""
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The form of a tenant's name, and of a grant's id."""
NAME_FORM: Final = "1 to 64 letters, digits, '.', '_' and '-' that begin with a digit or letter"

_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


class Grant(NamedTuple):
    """What a call may do: the RPCs of `scopes` on the tasks of `tenant`, before `not_after` (Unix seconds).

    `id` names it in logs. `digest` is the SHA-256 of its token, and empty where a call needs no token.
    """

    id: str
    tenant: str
    digest: bytes
    scopes: frozenset[str]
    not_after: float = math.inf

    @property
    def reaches_all_tenants(self) -> bool:
        """Whether it reaches the tasks of other tenants too. Without tokens there are no operators."""
        return OPERATE in self.scopes and bool(self.digest)


def token_digest(token: str) -> bytes:
    """Return the SHA-256 of a token."""
    return sha256(token.encode()).digest()


def parse_scopes(text: str) -> frozenset[str]:
    """Return the scopes of a comma-separated list; raise ValueError for none and for an unknown one."""
    scopes = frozenset(part.strip() for part in text.split(","))
    if not scopes <= set(SCOPES):
        raise ValueError(f"the scopes are {', '.join(SCOPES)}, comma separated")
    return scopes


def parse_grants(text: str) -> list[Grant]:
    """Return the grants of a file; raise ValueError for a malformed line, which the error does not quote.

    No id and no digest may occur twice.
    """
    grants: dict[str, Grant] = {}
    digests: set[bytes] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            grant = _parse(line)
            if grants.setdefault(grant.id, grant) is not grant:
                raise ValueError(f"the id {grant.id} is there twice")
            if grant.digest in digests:
                raise ValueError("the digest is there twice")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        digests.add(grant.digest)
    return list(grants.values())


def format_grant(grant: Grant) -> str:
    """Return the line of a grant, without a line end."""
    scopes = ",".join(scope for scope in SCOPES if scope in grant.scopes)
    end = "-"
    if grant.not_after != math.inf:
        end = datetime.fromtimestamp(grant.not_after, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{grant.id} {grant.tenant} {grant.digest.hex()} {scopes} {end}"


def _parse(line: str) -> Grant:
    fields = line.split()
    if len(fields) != 5:
        raise ValueError(f"has {len(fields)} fields, not id, tenant, SHA-256, scopes and not after")
    id_, tenant, digest, scopes, end = fields
    for what, name in (("id", id_), ("tenant", tenant)):
        if NAME.fullmatch(name) is None:
            raise ValueError(f"the {what} is not {NAME_FORM}")
    if _DIGEST.fullmatch(digest) is None:
        raise ValueError("the SHA-256 is not 64 hexadecimal digits")
    return Grant(id_, tenant, bytes.fromhex(digest), parse_scopes(scopes), _parse_end(end))


def _parse_end(text: str) -> float:
    if text == "-":
        return math.inf
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError("the end is neither - nor a time such as 2027-01-31T00:00:00Z")
    return moment.timestamp()
