"""The fast path out: what was just committed is published at once, what was acked leaves the outbox.

The relay promises nothing. What it does not take, fails to publish or dies with stands in the outbox,
and the sweeper finds it there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeAlias, TypeVar

import structlog

from postroad.v1 import events_pb2 as pb
from services.api.metrics import API_PUBLISHED, API_RELAY_HELD
from services.api.outbox import Decided, Item, item_of
from services.common.batching import Batcher
from services.common.database.errors import error_text
from services.common.events import encode
from services.common.kafka.publisher import Publisher, PublishFailure
from services.common.kafka.records import OutgoingRecord
from services.common.stage.metrics import STAGE_PUBLISH_FAILURES

__all__ = ["Creation", "Recording", "Relay"]

log = structlog.get_logger(__name__)

_PACE = 0.1
"""Seconds between two removals from the outbox: nobody waits for them, and a larger one costs little more."""


E_co = TypeVar("E_co", bound=Decided, covariant=True)


@dataclass(frozen=True, slots=True)
class Recording(Generic[E_co]):
    """An event to be recorded and published, with the trace context of its request.

    `size`: the bytes that it holds while it waits.
    """

    event: E_co
    traceparent: bytes
    size: int = 0


Creation: TypeAlias = Recording[pb.TaskCreated]
"""A task to be recorded."""


class Relay:
    """Publishes recorded events; to be used on one event loop.

    What it holds is bounded by `most` records and `most_bytes`: while Kafka is away the rest is left to
    the sweeper. `settle` takes what was acked out of the outbox.
    """

    def __init__(self, publisher: Publisher, settle: Batcher[Item, None], most: int, most_bytes: int) -> None:
        self._publisher, self._settle = publisher, settle
        self._most, self._most_bytes = most, most_bytes
        self._held: set[Item] = set()
        API_RELAY_HELD.set_function(lambda: len(self._held))
        self._room = True
        self._acked: list[Item] = []
        self._bytes = 0
        self._settling: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def holds(self, item: Item) -> bool:
        """Tell whether this item's event is being published right now."""
        return item in self._held

    def publish(self, recorded: Sequence[Recording[Decided]]) -> None:
        """Publish what a transaction recorded, as much of it as there is room for. Does not block."""
        batch: list[OutgoingRecord] = []
        items: list[Item] = []
        size = 0
        for recording in recorded:
            if len(self._held) + len(items) >= self._most or self._bytes + size >= self._most_bytes:
                break
            record = encode(recording.event, "api", recording.traceparent)
            batch.append(record)
            items.append(item_of(recording.event))
            size += len(record.value)
        self._tell_room(len(batch) == len(recorded))
        if batch:
            self._held.update(items)
            self._bytes += size
            self._idle.clear()
            self._publisher.send(batch, partial(self._delivered, items, size))

    async def drain(self, seconds: float) -> None:
        """Wait until everything held is published and has left the outbox, up to `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.warning("left to the sweeper", events=len(self._held))

    def _tell_room(self, room: bool) -> None:
        if room != self._room:
            self._room = room
            log.warning(
                "there is room again" if room else "full: what is recorded now is left to the sweeper"
            )

    def _delivered(self, items: list[Item], size: int, failures: list[PublishFailure]) -> None:
        self._bytes -= size
        failed = {index for index, _ in failures}
        if failed:
            STAGE_PUBLISH_FAILURES.labels("api").inc(len(failed))
            log.warning("not published, left to the sweeper", events=len(failed), error=str(failures[0][1]))
            self._let_go([items[index] for index in failed])
        if len(failed) == len(items):
            return
        if not self._acked:
            asyncio.get_running_loop().call_later(_PACE, self._flush)
        self._acked += [item for index, item in enumerate(items) if index not in failed]
        API_PUBLISHED.labels("relay").inc(len(items) - len(failed))

    def _flush(self) -> None:
        acked, self._acked = self._acked, []
        task = asyncio.ensure_future(self._settled(acked))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settled(self, acked: list[Item]) -> None:
        # Held until it has left the outbox, so that the sweeper does not publish it meanwhile.
        try:
            results = await self._settle.many(acked)
        finally:
            self._let_go(acked)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            log.warning("published but still in the outbox", events=len(errors), error=error_text(errors[0]))

    def _let_go(self, items: list[Item]) -> None:
        self._held.difference_update(items)
        if not self._held:
            self._idle.set()
