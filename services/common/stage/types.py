"""What a stage's author writes: a Stage, with a handler that turns each Record into an Outcome."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.common.events import EncodedEvent, Event
from services.common.stages import StageSpec

__all__ = [
    "BatchHandler",
    "Dead",
    "Done",
    "Finish",
    "Handler",
    "Outcome",
    "Record",
    "RecordsHandler",
    "Retry",
    "Stage",
]


@dataclass(slots=True, eq=False)
class Record:
    """One record as a handler sees it. Compared by identity: the same offset fetched again is another record.

    `topic` is the bare name of the event topic that it came from at first, also for a delayed record.
    `attempt` counts from 1 and rises with each Retry. `traceparent` is the W3C trace context, if any. `value`
    are the bytes of which `event` was decoded.
    """

    topic: str
    key: bytes | None
    event: Event
    attempt: int = 1
    traceparent: bytes | None = None
    value: bytes | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """Publish these events; then the record is finished."""

    events: Sequence[Event | EncodedEvent] = ()


@dataclass(frozen=True, slots=True)
class Retry:
    """Handle the record again as attempt + 1, once `due_at_ms` (Unix milliseconds) has come.

    `delay` selects the delay topic, one of the stage's `delays` (seconds). The record also comes back once
    its reader has known it for the delay and a tenth: a later due time comes from another clock. `events` are
    published too. Without `counts` the record comes back as the same attempt, since nothing was tried.
    """

    delay: int
    due_at_ms: int
    cause: str
    events: Sequence[Event | EncodedEvent] = ()
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Dead:
    """Publish the record to the stage's dead-letter topic with this cause."""

    cause: str


Outcome = Done | Retry | Dead
# A handler may not block. Where it has nothing to wait for, it returns an outcome and no coroutine. An
# exception makes the record Dead with the exception as its cause. A cancelled handler leaves its record
# unfinished and uncommitted, so that the partition's next owner handles it.
Handler = Callable[[Record], Outcome | Awaitable[Outcome]]
# It returns one outcome a record, in their order. An exception is not the fault of one record: the runtime
# handles the batch again after a pause, without end, since the partitions' next owners would do the same.
BatchHandler = Callable[[Sequence[Record]], Awaitable[Sequence[Outcome]]]

Finish = Callable[[Sequence[tuple[Record, Outcome | Exception]]], None]
"""Takes the outcomes of records, on the loop's thread. An exception makes its record Dead. Does not block.

A second outcome, and that of a cancelled record, change nothing.
"""


class RecordsHandler(Protocol):
    """A handler that the runtime gives all fetched records at once, and that finishes each when it likes.

    The runtime awaits nothing of it, so that a record costs no asyncio task.
    """

    def start(self, records: Sequence[Record], finish: Finish) -> None:
        """Begin to handle records; `finish` takes their outcomes, and is the same at every call.

        Does not block. An error ends the stage.
        """

    def cancel(self, records: Sequence[Record]) -> None:
        """Handle these records no longer: their partition's next owner does. Does not block."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: the bare topics that it reads, their decoders, and one handler.

    The handler is `handle`, `handle_batch` or `handle_all`.
    """

    name: str
    topics: Sequence[str]
    decoders: Mapping[str, Callable[[bytes | None], Event]]
    handle: Handler | None = None
    handle_batch: BatchHandler | None = None
    delays: Sequence[int] = field(default=())
    close: Callable[[], Awaitable[None]] | None = None
    """Awaited once the last handler has ended or was cancelled; it can still publish events."""
    handle_all: RecordsHandler | None = None

    @classmethod
    def of(
        cls,
        spec: StageSpec,
        *,
        handle: Handler | None = None,
        handle_batch: BatchHandler | None = None,
        handle_all: RecordsHandler | None = None,
        delays: Sequence[int] = (),
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> Stage:
        """Return a stage of the list with its handler; `delays` are in seconds."""
        return cls(spec.name, spec.reads, spec.decoders, handle, handle_batch, delays, close, handle_all)
