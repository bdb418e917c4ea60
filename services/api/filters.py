"""Parses what a List, a Count or a Watch selects: typed fields and `_filters`, into one Filter. Pure.

`_filters` is a Struct. Clients write it plainly, `{"status": "pending"}`, or as the Struct's own message in
JSON, `{"fields": {"status": {"string_value": "pending"}}}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import TypeAlias

from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from postroad.v1 import task_service_pb2
from services.api.errors import InvalidArgument, Violation
from services.api.validation import label_violations, timestamp_us
from services.common.addresses import ascii_domain, normalise
from services.common.statuses import STATUSES

__all__ = ["Filter", "Request", "parse"]

Request: TypeAlias = (
    task_service_pb2.ListRequest | task_service_pb2.CountRequest | task_service_pb2.WatchRequest
)
Json: TypeAlias = "str | float | bool | Sequence[Json] | Mapping[str, Json] | None"

_MAX_REASON = 64
_MAX_VALUES = 500
"""Values that `_filters` may have in all. The largest valid `_filters`, with all labels, has fewer."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects tasks. None or an empty value selects all. Times are microseconds since the Unix epoch."""

    status: tuple[str, ...] = ()
    email: str | None = None
    domain: str | None = None
    reason: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    created_from: int | None = None
    created_to: int | None = None

    def digest(self, tenant: str) -> bytes:
        """Return 16 bytes that identify this filter of this tenant."""
        return blake2b(repr((1, tenant, self)).encode(), digest_size=16).digest()


def parse(request: Request) -> Filter:
    """Return the filter of a request; raise InvalidArgument naming each invalid field.

    `_filters` may use those fields of Filter that the request also has as typed fields.
    """
    violations: list[Violation] = []
    builder = _FilterBuilder(violations)
    typed = request.DESCRIPTOR.fields_by_name
    names = frozenset(field.name for field in fields(Filter) if field.name in typed)
    _add_typed_fields(request, names, builder)
    if request.HasField("_filters"):
        _add_struct(request._filters, names, builder)
    if violations:
        raise InvalidArgument(violations)
    return Filter(**builder.values)  # type: ignore[arg-type]


class _FilterBuilder:
    """Collects a filter's values and violations. A field may be set twice only to the same value."""

    def __init__(self, violations: list[Violation]) -> None:
        self.violations = violations
        self.values: dict[str, object] = {}

    def refuse(self, path: str, description: str) -> None:
        self.violations.append(Violation(path, description))

    def set(self, name: str, path: str, value: object) -> None:
        if self.values.setdefault(name, value) != value:
            self.refuse(path, "differs from the typed field")

    def set_text(self, name: str, path: str, value: str) -> None:
        try:
            if name == "email":
                value = normalise(value)[0]
            elif name == "domain":
                value = ascii_domain(value)
            elif not value or len(value) > _MAX_REASON:
                raise ValueError(f"is not a reason (1 to {_MAX_REASON} characters)")
        except ValueError as error:
            self.refuse(path, str(error))
        else:
            self.set(name, path, value)

    def set_statuses(self, path: str, values: Sequence[str]) -> None:
        if len(values) > _MAX_VALUES:
            self.refuse(path, f"{_MAX_VALUES} at most")
            return
        unknown = [value for value in values if value not in STATUSES]
        if unknown:
            self.refuse(path, f"is not one of {', '.join(STATUSES)}")
        else:
            self.set("status", path, tuple(sorted(set(values))))

    def set_time(self, name: str, path: str, value: Timestamp) -> None:
        # Rounded up: the first whole microsecond at or after this time bounds the same tasks.
        try:
            self.set(name, path, timestamp_us(value))
        except ValueError as error:
            self.refuse(path, str(error))

    def set_labels(self, path: str, values: Mapping[str, str]) -> None:
        # A filter accepts only labels that a task can have.
        if violations := label_violations(path, values):
            self.violations += violations
        else:
            self.set("labels", path, tuple(sorted(values.items())))


def _add_typed_fields(request: Request, names: Set[str], builder: _FilterBuilder) -> None:
    if request.status:
        builder.set_statuses("status", request.status)
    for name in ("email", "domain", "reason"):
        if value := getattr(request, name):
            builder.set_text(name, name, value)
    if request.labels:
        builder.set_labels("labels", request.labels)
    for name in ("created_from", "created_to"):
        if name in names and request.HasField(name):  # type: ignore[arg-type]
            builder.set_time(name, name, getattr(request, name))


def _add_struct(struct: Struct, known: Set[str], builder: _FilterBuilder) -> None:
    path = "_filters"
    try:
        members = _StructReader().read(struct)
    except OverflowError as error:
        builder.refuse(path, str(error))
        return
    inner = members.get("fields")
    if len(members) == 1 and isinstance(inner, Mapping):
        path = "_filters.fields"
        members = {key: _plain(value) for key, value in inner.items()}
    for name, value in sorted(members.items()):
        member_path = f"{path}.{name[:60].encode('unicode_escape').decode()}"
        if name not in known:
            builder.refuse(member_path, f"is not a filter; there are {', '.join(sorted(known))}")
        else:
            _add_member(name, member_path, value, builder)


def _add_member(name: str, path: str, value: Json, builder: _FilterBuilder) -> None:
    if name == "labels":
        if isinstance(value, Mapping) and all(isinstance(member, str) for member in value.values()):
            builder.set_labels(path, value)  # type: ignore[arg-type]
        else:
            builder.refuse(path, "takes an object of strings")
    elif name == "status" and isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(isinstance(member, str) for member in value):
            builder.set_statuses(path, value)  # type: ignore[arg-type]
        else:
            builder.refuse(path, "takes a string or a list of strings")
    elif not isinstance(value, str):
        builder.refuse(path, "takes a string")
    elif name == "status":
        builder.set_statuses(path, [value])
    elif name in ("created_from", "created_to"):
        moment = Timestamp()
        try:
            moment.FromJsonString(value)
        except ValueError:
            builder.refuse(path, "takes a time in the form of RFC 3339")
        else:
            builder.set_time(name, path, moment)
    else:
        builder.set_text(name, path, value)


class _StructReader:
    """Converts a Struct to plain values. Raises OverflowError for more than 500 values."""

    def __init__(self) -> None:
        self._left = _MAX_VALUES

    def read(self, struct: Struct) -> dict[str, Json]:
        self._count(len(struct.fields))
        return {key: self._value(member) for key, member in struct.fields.items()}

    def _count(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise OverflowError(f"has {_MAX_VALUES} values at most")

    def _value(self, value: Value) -> Json:
        match value.WhichOneof("kind"):
            case "struct_value":
                return self.read(value.struct_value)
            case "list_value":
                self._count(len(value.list_value.values))
                return [self._value(member) for member in value.list_value.values]
            case "string_value":
                return value.string_value
            case "number_value":
                return value.number_value
            case "bool_value":
                return value.bool_value
            case _:
                return None


def _plain(value: Json) -> Json:
    """Return the value of a Value message in JSON; None for any other JSON, which no filter takes."""
    if not isinstance(value, Mapping) or len(value) != 1:
        return None
    [(kind, inner)] = value.items()
    match kind, inner:
        case (("string_value" | "stringValue"), str()):
            return inner
        case (("list_value" | "listValue"), {"values": list(members)}):
            return [_plain(member) for member in members]
        case (("struct_value" | "structValue"), {"fields": Mapping() as members}):
            return {key: _plain(member) for key, member in members.items()}
        case _:
            return None
