"""The flags that choose tasks: the same for `list` and `watch`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, TypeAlias

import typer

from services.cli.errors import USAGE, Failure
from services.cli.times import parse_time

__all__ = [
    "Domain",
    "Email",
    "From",
    "Labels",
    "Reason",
    "Statuses",
    "TaskStatus",
    "To",
    "creation_fields",
    "filter_fields",
    "parse_pairs",
]

_PANEL = "Which tasks"


class TaskStatus(StrEnum):
    """The statuses of a task."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    UNCERTAIN = "uncertain"
    CANCELLED = "cancelled"


def _option(*names: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=_PANEL, show_default=False)


Statuses: TypeAlias = Annotated[
    list[TaskStatus] | None,
    _option(
        "--status",
        "-s",
        text="Of this status, several: of any: " + ", ".join(TaskStatus) + ".",
        metavar="STATUS",
    ),
]
Email: TypeAlias = Annotated[str, _option("--email", text="To this recipient.", metavar="ADDRESS")]
Domain: TypeAlias = Annotated[str, _option("--domain", text="To recipients of this domain.", metavar="NAME")]
Reason: TypeAlias = Annotated[
    str,
    _option("--reason", text="With this reason for their status, such as null_mx.", metavar="CODE"),
]
Labels: TypeAlias = Annotated[
    list[str] | None,
    _option("--label", "-l", text="With this label; several: with all.", metavar="KEY=VALUE"),
]
From: TypeAlias = Annotated[str, _option("--from", text="Created then or later.", metavar="TIME")]
To: TypeAlias = Annotated[str, _option("--to", text="Created before.", metavar="TIME")]


def parse_pairs(texts: Sequence[str] | None, flag: str, separator: str = "=") -> dict[str, str]:
    """Return `KEY=VALUE` texts as a dictionary. Raises Failure, which names the flag."""
    found: dict[str, str] = {}
    for text in texts or ():
        key, there, value = text.partition(separator)
        if not there or not key.strip():
            raise Failure(f"{flag} {text!r} is no KEY{separator}VALUE", USAGE)
        if key.strip() in found:
            raise Failure(f"{flag} names {key.strip()!r} twice", USAGE)
        found[key.strip()] = value.strip() if separator == ":" else value
    return found


def filter_fields(
    status: Sequence[str] | None, email: str, domain: str, reason: str, label: Sequence[str] | None
) -> dict[str, Any]:
    """Return the fields of a ListRequest, CountRequest or WatchRequest for these flags."""
    return {
        "status": [str(one) for one in dict.fromkeys(status or ())],
        "email": email,
        "domain": domain,
        "reason": reason,
        "labels": parse_pairs(label, "--label"),
    }


def creation_fields(from_: str, to: str) -> dict[str, Any]:
    """Return the fields of a ListRequest or CountRequest for --from and --to."""
    now = datetime.now(UTC)
    times = {"created_from": from_, "created_to": to}
    return {name: parse_time(text, now) for name, text in times.items() if text}
