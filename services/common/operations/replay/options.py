"""What a replay is asked for: its options, checked once and stored with the replay. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar
from uuid import UUID

from services.common.addresses import ascii_domain, normalise
from services.common.kafka.topics import EVENT_TOPICS
from services.common.operations.errors import InvalidOption
from services.common.operations.replay.records import WORK_TOPICS, can_replay
from services.common.operations.replay.replay_decision import REOPENABLE
from services.common.operations.replay.task_state import TaskState
from services.common.stages import DELAYING
from services.common.statuses import STATUSES

__all__ = ["ReplayOptions", "TaskFilter", "check_options", "check_rate", "parse_options"]

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks a replay is about. Values of one kind are alternatives. All kinds and labels must match.

    Recipients and domains are in lower case, and are compared without regard to case.
    """

    status: frozenset[str] = frozenset()
    reason: frozenset[str] = frozenset()
    recipient: frozenset[str] = frozenset()
    domain: frozenset[str] = frozenset()
    ids: frozenset[bytes] = frozenset()
    labels: tuple[tuple[str, str], ...] = ()

    def matches(self, id_: bytes, task: TaskState) -> bool:
        """Return whether the replay is about this task."""
        return (
            (not self.ids or id_ in self.ids)
            and (not self.status or task.status in self.status)
            and (not self.reason or task.reason in self.reason)
            and (not self.recipient or task.recipient.lower() in self.recipient)
            and (not self.domain or task.domain.lower() in self.domain)
            and all(task.labels.get(key) == value for key, value in self.labels)
        )


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """The options of a replay. `topic` is a bare name, `rate` the most records produced a second.

    `start` and `end` are kept as the user wrote them. Until `check_options`, recipients and domains have any
    form.
    """

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

    def task_filter(self) -> TaskFilter:
        """Return which tasks the replay is about. The options must have passed `check_options`."""
        return TaskFilter(
            frozenset(self.status),
            frozenset(self.reason),
            frozenset(text.lower() for text in self.recipient),
            frozenset(text.lower() for text in self.domain),
            frozenset(UUID(text).bytes for text in self.id),
            tuple((key, value) for key, _, value in (text.partition("=") for text in self.label)),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the options as JSON can hold them."""
        return asdict(self)


def parse_options(stored: Mapping[str, Any]) -> ReplayOptions:
    """Return the options that `as_json` made."""
    names = {field.name for field in fields(ReplayOptions)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in stored.items()
        if name in names
    }
    return ReplayOptions(**given)


def check_options(options: ReplayOptions) -> ReplayOptions:
    """Return the options with recipients and domains in the form that tasks have. Raises InvalidOption."""
    if not can_replay(options.topic):
        others = ", ".join(f"{stage}.delay.N" for stage in DELAYING)
        raise InvalidOption("topic", f"{options.topic!r} is none of {', '.join(EVENT_TOPICS)}, {others}")
    _check_among("status", options.status, STATUSES)
    _check_among("reopen", options.reopen, REOPENABLE)
    if options.reopen and options.topic not in WORK_TOPICS:
        raise InvalidOption("reopen", f"only {' and '.join(WORK_TOPICS)} make a stage work again")
    for text in options.id:
        _parse("id", UUID, text)
    check_rate(options.rate)
    return replace(
        options,
        recipient=tuple(_parse("recipient", normalise, text)[0] for text in options.recipient),
        domain=tuple(_parse("domain", ascii_domain, text) for text in options.domain),
        label=tuple(f"{key}={value}" for key, value in _labels(options.label).items()),
    )


def check_rate(rate: float) -> None:
    """Raise InvalidOption unless records can be produced at this rate."""
    if not 0 < rate <= 1_000_000:
        raise InvalidOption("rate", "records a second, more than 0 and at most 1000000")


def _labels(texts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InvalidOption("label", f"{text!r} is no KEY=VALUE")
        if key.strip() in found:
            raise InvalidOption("label", f"names {key.strip()!r} twice")
        found[key.strip()] = value
    return found


def _parse(option: str, parse: Callable[[str], R], text: str) -> R:
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidOption(option, f"{text!r}: {error}") from None


def _check_among(option: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise InvalidOption(option, f"{value!r} is none of {', '.join(known)}")
