"""The call that the api is answering: its tenant, its metadata, its size and what it may do."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import NamedTuple

from services.api.errors import invalid_field
from services.common.grants import CONTENT, Grant

__all__ = ["TENANT_KEY", "Call", "Metadata", "current_call", "idempotency_key", "set_call"]

TENANT_KEY = "postroad-tenant"
"""The metadata key by which an operator names the tenant of a call."""

_KEY = "idempotency-key"


class Metadata(dict[str, str | bytes]):
    """A call's metadata.

    A key with several values is only in `repeated`, because nobody knows which value the client means.
    """

    def __init__(self, pairs: Iterable[tuple[str, str | bytes]]) -> None:
        super().__init__()
        self.repeated: set[str] = set()
        for key, value in pairs:
            if self.setdefault(key, value) != value:
                self.repeated.add(key)
        for key in self.repeated:
            del self[key]


class Call(NamedTuple):
    """One RPC. `size` is the length of its serialized request in bytes.

    `tenant` is that of the tasks: the one of `grant`, unless an operator named another one.
    """

    tenant: str
    metadata: Metadata
    size: int
    grant: Grant

    @property
    def finds_tenants(self) -> bool:
        """Whether a task's id is enough, because the grant reaches all tenants and the call names none."""
        return self.grant.reaches_all_tenants and TENANT_KEY not in self.metadata

    def sees_content(self, tenant: str) -> bool:
        """Return whether addresses, subjects and bodies of this tenant's mails are shown."""
        return tenant == self.grant.tenant or CONTENT in self.grant.scopes


_CALL: ContextVar[Call] = ContextVar("call")


def set_call(call: Call) -> None:
    """Make this the current call. gRPC runs each RPC in a task, and so in a context, of its own."""
    _CALL.set(call)


def current_call() -> Call:
    """Return the call that the running task answers."""
    return _CALL.get()


def idempotency_key(metadata: Metadata) -> str:
    """Return the key of a Create, empty without one; raise InvalidArgument where it would be ignored."""
    binary = f"{_KEY}-bin"
    if binary in metadata or binary in metadata.repeated:
        raise invalid_field(binary, f"is not the key: use {_KEY}, or the request's idempotency_key")
    if _KEY in metadata.repeated:
        raise invalid_field(_KEY, "is given twice, with two values")
    return str(metadata.get(_KEY, ""))
