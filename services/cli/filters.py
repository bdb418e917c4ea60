"""Which tasks a command is about: the same flags for `list`, `watch` and whatever chooses tasks."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, TypeAlias

import typer

from services.cli.errors import USAGE, Failure
from services.cli.times import moment

__all__ = [
    "Domain",
    "Email",
    "From",
    "Labels",
    "Reason",
    "Status",
    "Statuses",
    "To",
    "created_between",
    "pairs",
    "task_filter",
]

_PANEL = "Which tasks"


class Status(StrEnum):
    """The statuses that a task can have."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    UNCERTAIN = "uncertain"
    CANCELLED = "cancelled"


def _option(*names: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=_PANEL, show_default=False)


Statuses: TypeAlias = Annotated[
    list[Status] | None,
    _option(
        "--status",
        "-s",
        text="Of this status, several: of any: " + ", ".join(Status) + ".",
        metavar="STATUS",
    ),
]
Email: TypeAlias = Annotated[str, _option("--email", text="To this recipient.", metavar="ADDRESS")]
Domain: TypeAlias = Annotated[str, _option("--domain", text="To recipients of this domain.", metavar="NAME")]
Reason: TypeAlias = Annotated[
    str,
    _option("--reason", text="Standing where they stand for this reason, such as null_mx.", metavar="CODE"),
]
Labels: TypeAlias = Annotated[
    list[str] | None,
    _option("--label", "-l", text="With this label; several: with all.", metavar="KEY=VALUE"),
]
From: TypeAlias = Annotated[str, _option("--from", text="Created then or later.", metavar="TIME")]
To: TypeAlias = Annotated[str, _option("--to", text="Created before.", metavar="TIME")]


def pairs(texts: Sequence[str] | None, flag: str, separator: str = "=") -> dict[str, str]:
    """Return `KEY=VALUE` texts as a dictionary; raises Failure."""
    found: dict[str, str] = {}
    for text in texts or ():
        key, there, value = text.partition(separator)
        if not there or not key.strip():
            raise Failure(f"{flag} {text!r} is no KEY{separator}VALUE", USAGE)
        if key.strip() in found:
            raise Failure(f"{flag} names {key.strip()!r} twice", USAGE)
        found[key.strip()] = value.strip() if separator == ":" else value
    return found


def task_filter(
    status: Sequence[str] | None, email: str, domain: str, reason: str, label: Sequence[str] | None
) -> dict[str, Any]:
    """Return the fields of a ListRequest, a CountRequest or a WatchRequest that these flags mean."""
    return {
        "status": [str(one) for one in dict.fromkeys(status or ())],
        "email": email,
        "domain": domain,
        "reason": reason,
        "labels": pairs(label, "--label"),
    }


def created_between(from_: str, to: str) -> dict[str, Any]:
    """Return the fields of a ListRequest or a CountRequest that --from and --to mean."""
    now = datetime.now(UTC)
    times = {"created_from": from_, "created_to": to}
    return {name: moment(text, now) for name, text in times.items() if text}
