"""What a stage is made of: records come in, outcomes go out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from services.common.events import Event
from services.common.stages import StageSpec

__all__ = ["BatchHandler", "Dead", "Done", "Handler", "Outcome", "Record", "Retry", "Stage"]


@dataclass(slots=True, eq=False)
class Record:
    """One record as a handler sees it. Compared by identity: the same offset fetched again is another record.

    `topic` is the bare name of the event topic that it came from at first, also when it comes back
    from a delay topic; `attempt` counts from 1 and rises with each Retry.
    """

    topic: str
    key: bytes | None
    event: Event
    attempt: int = 1
    traceparent: bytes | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """Publish these events, then the record is finished."""

    events: Sequence[Event] = ()


@dataclass(frozen=True, slots=True)
class Retry:
    """Hand the record back as attempt + 1 once `due_at_ms` (Unix milliseconds) has come, never earlier.

    `delay` names the delay topic, one of the stage's `delays` (seconds); `events` are published as well.
    A due time beyond the delay and a tenth of it counts as one of another clock: the record waits no longer.
    Unless it `counts` the record comes back as the same attempt: nothing was tried.
    """

    delay: int
    due_at_ms: int
    cause: str
    events: Sequence[Event] = ()
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Dead:
    """Put the record on the stage's dead-letter topic with this cause."""

    cause: str


Outcome = Done | Retry | Dead
# A handler may not block. Where it has nothing to wait for it answers at once, without a coroutine.
# What it raises makes the record Dead with the exception as its cause; being cancelled leaves the
# record unfinished and uncommitted, so that its next owner handles it.
Handler = Callable[[Record], Outcome | Awaitable[Outcome]]
# Answers one outcome a record, in the records' order. What it raises is no fault of one record: the
# batch is handled again after a pause, for ever, since its partition's next owner would do the same.
BatchHandler = Callable[[Sequence[Record]], Awaitable[Sequence[Outcome]]]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: what it reads and one handler. Exactly one of `handle` and `handle_batch` is given."""

    name: str
    topics: Sequence[str]
    decoders: Mapping[str, Callable[[bytes | None], Event]]
    handle: Handler | None = None
    handle_batch: BatchHandler | None = None
    delays: Sequence[int] = field(default=())
    close: Callable[[], Awaitable[None]] | None = None
    """Awaited after the last handler has ended or was cancelled, while events can still be published."""

    @classmethod
    def of(
        cls,
        spec: StageSpec,
        *,
        handle: Handler | None = None,
        handle_batch: BatchHandler | None = None,
        delays: Sequence[int] = (),
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> Stage:
        """Return a stage of the list with its handler; `delays` are in seconds."""
        return cls(spec.name, spec.reads, spec.decoders, handle, handle_batch, delays, close)
