"""What a List, a Count or a Watch may ask for: pure, typed fields and `_filters` made one Filter.

`_filters` is a Struct. Clients write it in two ways: plainly, `{"status": "pending"}`, or as a
Struct's own message spelled out in JSON, `{"fields": {"status": {"string_value": "pending"}}}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import TypeAlias

from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from postroad.v1 import task_service_pb2
from services.api.errors import Refused, Violation
from services.api.times import micros
from services.api.validation import label_problems
from services.common.addresses import ascii_domain, normalise
from services.common.database.tables import STATUSES

__all__ = ["Filter", "Request", "parse"]

Request: TypeAlias = (
    task_service_pb2.ListRequest | task_service_pb2.CountRequest | task_service_pb2.WatchRequest
)
Json: TypeAlias = "str | float | bool | Sequence[Json] | Mapping[str, Json] | None"

_MAX_REASON = 64
_MOST_VALUES = 500
"""Values that `_filters` may have in all: more than the most labels spelled out take."""


@dataclass(frozen=True, slots=True)
class Filter:
    """What tasks are asked for; None or empty asks nothing. Times are microseconds since the Unix epoch."""

    status: tuple[str, ...] = ()
    email: str | None = None
    domain: str | None = None
    reason: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    created_from: int | None = None
    created_to: int | None = None

    def digest(self, tenant: str) -> bytes:
        """Return 16 bytes that stand for this filter in this tenant's hands."""
        return blake2b(repr((1, tenant, self)).encode(), digest_size=16).digest()


def parse(request: Request) -> Filter:
    """Return what a request asks for; raise Refused naming each field that cannot be.

    Of a Filter's fields a request may ask for those that it has itself, typed.
    """
    found: list[Violation] = []
    asked = _Asked(found)
    there = request.DESCRIPTOR.fields_by_name
    names = frozenset(field.name for field in fields(Filter) if field.name in there)
    _typed(request, names, asked)
    if request.HasField("_filters"):
        _struct(request._filters, names, asked)
    if found:
        raise Refused(found)
    return Filter(**asked.values)  # type: ignore[arg-type]


class _Asked:
    """Collects what is asked for, a field once or the same twice, and what is wrong with it."""

    def __init__(self, found: list[Violation]) -> None:
        self.found = found
        self.values: dict[str, object] = {}

    def refuse(self, path: str, problem: str) -> None:
        self.found.append(Violation(path, problem))

    def put(self, name: str, path: str, value: object) -> None:
        if self.values.setdefault(name, value) != value:
            self.refuse(path, "asks for another value than the typed field")

    def text(self, name: str, path: str, value: str) -> None:
        try:
            if name == "email":
                value = normalise(value)[0]
            elif name == "domain":
                value = ascii_domain(value)
            elif not value or len(value) > _MAX_REASON:
                raise ValueError(f"is no reason (1 to {_MAX_REASON} characters)")
        except ValueError as error:
            self.refuse(path, str(error))
        else:
            self.put(name, path, value)

    def statuses(self, path: str, values: Sequence[str]) -> None:
        if len(values) > _MOST_VALUES:
            self.refuse(path, f"{_MOST_VALUES} at most")
            return
        unknown = [value for value in values if value not in STATUSES]
        if unknown:
            self.refuse(path, f"is none of {', '.join(STATUSES)}")
        else:
            self.put("status", path, tuple(sorted(set(values))))

    def time(self, name: str, path: str, value: Timestamp) -> None:
        # Rounded up: what was created at or after a point between two microseconds came at the next.
        try:
            self.put(name, path, micros(value))
        except ValueError as error:
            self.refuse(path, str(error))

    def labels(self, path: str, values: Mapping[str, str]) -> None:
        # What no task can have is not asked for.
        if problems := label_problems(path, values):
            self.found += problems
        else:
            self.put("labels", path, tuple(sorted(values.items())))


def _typed(request: Request, names: Set[str], asked: _Asked) -> None:
    if request.status:
        asked.statuses("status", request.status)
    for name in ("email", "domain", "reason"):
        if value := getattr(request, name):
            asked.text(name, name, value)
    if request.labels:
        asked.labels("labels", request.labels)
    for name in ("created_from", "created_to"):
        if name in names and request.HasField(name):  # type: ignore[arg-type]
            asked.time(name, name, getattr(request, name))


def _struct(struct: Struct, known: Set[str], asked: _Asked) -> None:
    path = "_filters"
    try:
        members = _Walk().members(struct)
    except OverflowError as error:
        asked.refuse(path, str(error))
        return
    inner = members.get("fields")
    if len(members) == 1 and isinstance(inner, Mapping):
        path = "_filters.fields"
        members = {key: _plain(value) for key, value in inner.items()}
    for name, value in sorted(members.items()):
        where = f"{path}.{name[:60].encode('unicode_escape').decode()}"
        if name not in known:
            asked.refuse(where, f"is no filter; there are {', '.join(sorted(known))}")
        else:
            _member(name, where, value, asked)


def _member(name: str, where: str, value: Json, asked: _Asked) -> None:
    if name == "labels":
        if isinstance(value, Mapping) and all(isinstance(member, str) for member in value.values()):
            asked.labels(where, value)  # type: ignore[arg-type]
        else:
            asked.refuse(where, "takes an object of strings")
    elif name == "status" and isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(isinstance(member, str) for member in value):
            asked.statuses(where, value)  # type: ignore[arg-type]
        else:
            asked.refuse(where, "takes a string or a list of strings")
    elif not isinstance(value, str):
        asked.refuse(where, "takes a string")
    elif name == "status":
        asked.statuses(where, [value])
    elif name in ("created_from", "created_to"):
        moment = Timestamp()
        try:
            moment.FromJsonString(value)
        except ValueError:
            asked.refuse(where, "takes a time as RFC 3339 writes it")
        else:
            asked.time(name, where, moment)
    else:
        asked.text(name, where, value)


class _Walk:
    """Makes plain values of a Struct's. Raises OverflowError before it walks more than may be."""

    def __init__(self) -> None:
        self._left = _MOST_VALUES

    def members(self, struct: Struct) -> dict[str, Json]:
        self._take(len(struct.fields))
        return {key: self._value(member) for key, member in struct.fields.items()}

    def _take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise OverflowError(f"has {_MOST_VALUES} values at most")

    def _value(self, value: Value) -> Json:
        match value.WhichOneof("kind"):
            case "struct_value":
                return self.members(value.struct_value)
            case "list_value":
                self._take(len(value.list_value.values))
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
    """Return what a Value spelled out as its own message says; what is none is no filter's value: null."""
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
