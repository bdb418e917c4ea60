"""Which scopes allow each RPC, and of which tenant's tasks it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from services.api.call import TENANT_KEY, Metadata
from services.api.errors import StatusError, invalid_field, permission_denied
from services.api.metrics import API_DENIED
from services.common.grants import CANCEL, CREATE, NAME, NAME_FORM, OPERATE, READ, Grant

__all__ = ["SCOPES_OF", "denied", "tenant_of"]

SCOPES_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "Create": (CREATE,),
    "BatchCreate": (CREATE,),
    "Get": (READ,),
    "List": (READ,),
    "Count": (READ,),
    "Watch": (READ,),
    "Cancel": (CANCEL,),
    # A Retry sends a mail, and a Resolve ends a task: a tenant may do both with its own tasks.
    "Retry": (CREATE, OPERATE),
    "Resolve": (CANCEL, OPERATE),
}
"""The scopes of each RPC. A grant needs one of them."""


def tenant_of(rpc: str, grant: Grant, metadata: Metadata) -> str:
    """Return the tenant of a call; raise StatusError where its grant does not allow the call."""
    scopes = SCOPES_OF[rpc]
    if grant.scopes.isdisjoint(scopes):
        raise denied(scopes[0], rpc)
    if TENANT_KEY not in metadata and TENANT_KEY not in metadata.repeated:
        return grant.tenant
    wanted = str(metadata.get(TENANT_KEY, ""))
    if wanted == grant.tenant:
        return wanted
    if NAME.fullmatch(wanted) is None:
        raise invalid_field(TENANT_KEY, f"is not one tenant's name: {NAME_FORM}")
    if not grant.reaches_all_tenants:
        raise denied(OPERATE, "another tenant")
    if scopes == (CREATE,):
        # The mail would go out in the name of the tenant, whose quotas and bills it would count for.
        raise invalid_field(TENANT_KEY, f"is of no use in {rpc}: each tenant creates its own tasks")
    return wanted


def denied(scope: str, what: str) -> StatusError:
    """Return PERMISSION_DENIED for what needs this scope, and count it."""
    API_DENIED.labels("SCOPE_MISSING").inc()
    return permission_denied(scope, what)
