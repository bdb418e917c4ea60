"""What a client sends beside its request; pure."""

from __future__ import annotations

from collections.abc import Iterable

from services.api.errors import invalid_field

__all__ = ["Metadata", "idempotency_key"]

_KEY = "idempotency-key"


class Metadata(dict[str, str | bytes]):
    """A call's metadata: each key with its value.

    A key that came with several values is in `repeated` alone: any of them may be the one that was meant.
    """

    def __init__(self, pairs: Iterable[tuple[str, str | bytes]]) -> None:
        super().__init__()
        self.repeated: set[str] = set()
        for key, value in pairs:
            if self.setdefault(key, value) != value:
                self.repeated.add(key)
        for key in self.repeated:
            del self[key]


def idempotency_key(metadata: Metadata) -> str:
    """Return a Create's key, empty where it has none; raise InvalidArgument where it would go unheard."""
    binary = f"{_KEY}-bin"
    if binary in metadata or binary in metadata.repeated:
        raise invalid_field(binary, f"is no key: use {_KEY}, or the request's idempotency_key")
    if _KEY in metadata.repeated:
        raise invalid_field(_KEY, "is given twice, with two values")
    return str(metadata.get(_KEY, ""))
