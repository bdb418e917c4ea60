"""What a replay was asked for: the command's arguments, checked once and kept with the replay. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar
from uuid import UUID

from services.cli.errors import Failure
from services.cli.filters import pairs
from services.cli.replay.decide import REOPENABLE
from services.cli.replay.records import WORK, replayable
from services.cli.replay.selection import Selection
from services.common.addresses import ascii_domain, normalise
from services.common.database.tables import STATUSES
from services.common.kafka.topics import EVENT_TOPICS
from services.common.stages import DELAYING

__all__ = ["Asked", "asked_from", "check_rate", "checked"]

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments. `topic` is a bare name; recipients and domains have any form until they are checked."""

    topic: str
    start: str = "start"
    end: str = "end"
    status: tuple[str, ...] = ()
    reason: tuple[str, ...] = ()
    recipient: tuple[str, ...] = ()
    domain: tuple[str, ...] = ()
    id: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    reopen: tuple[str, ...] = ()
    rate: float = 500.0

    def selection(self) -> Selection:
        """Return which tasks are meant."""
        return Selection(
            frozenset(self.status),
            frozenset(self.reason),
            frozenset(text.lower() for text in self.recipient),
            frozenset(text.lower() for text in self.domain),
            frozenset(UUID(text).bytes for text in self.id),
            tuple((key, value) for key, _, value in (text.partition("=") for text in self.label)),
        )

    def arguments(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)


def asked_from(arguments: Mapping[str, Any]) -> Asked:
    """Return what `arguments` made."""
    names = {field.name for field in fields(Asked)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
        if name in names
    }
    return Asked(**given)


def checked(asked: Asked) -> Asked:
    """Return it with recipients and domains in the form that tasks have.

    Raises ValueError, naming the argument, where something is asked for that cannot be.
    """
    if not replayable(asked.topic):
        others = ", ".join(f"{stage}.delay.N" for stage in DELAYING)
        raise ValueError(f"TOPIC: {asked.topic!r} is none of {', '.join(EVENT_TOPICS)}, {others}")
    _among("--status", asked.status, STATUSES)
    _among("--reopen", asked.reopen, REOPENABLE)
    if asked.reopen and asked.topic not in WORK:
        raise ValueError(f"--reopen: only {' and '.join(WORK)} make a stage work again")
    for text in asked.id:
        _about("--id", UUID, text)
    try:
        labels = pairs(asked.label, "--label")
    except Failure as error:
        raise ValueError(error.line) from None
    check_rate(asked.rate)
    return replace(
        asked,
        recipient=tuple(_about("--recipient", normalise, text)[0] for text in asked.recipient),
        domain=tuple(_about("--domain", ascii_domain, text) for text in asked.domain),
        label=tuple(f"{key}={value}" for key, value in labels.items()),
    )


def check_rate(rate: float) -> None:
    """Raise ValueError, naming the argument, where records cannot go at this rate."""
    if not 0 < rate <= 1_000_000:
        raise ValueError("--rate: records a second, more than 0 and at most 1000000")


def _about(flag: str, parse: Callable[[str], R], text: str) -> R:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {text!r}: {error}") from None


def _among(flag: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{flag}: {value!r} is none of {', '.join(known)}")
