"""A stage, running: records in, handler, outcomes out, positions committed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any

import structlog
from confluent_kafka import Consumer

from services.common.config import Settings
from services.common.events import Event, encode
from services.common.kafka.clients import consumer_config
from services.common.kafka.cluster_check import ClusterCheck
from services.common.kafka.publisher import Publisher, hopeless
from services.common.kafka.topics import Names
from services.common.stage import metrics
from services.common.stage.broker_view import BrokerView
from services.common.stage.inflight import InFlight
from services.common.stage.intake import Intake
from services.common.stage.ledger import Assignment, Fetched, Ledger
from services.common.stage.membership import View
from services.common.stage.outgoing import Render
from services.common.stage.poller import Poller
from services.common.stage.types import Stage
from services.common.stage.work import Work

__all__ = ["StageRuntime"]

log = structlog.get_logger(__name__)

# Beyond the drain: the last commit, leaving the group, the producer's last records.
_CLOSE_SECONDS = 15.0
# What a cancelled handler may take to end.
_CANCEL_SECONDS = 5.0


class StageRuntime:
    """Runs one stage until it is stopped.

    `source` is who speaks in the events (`ce_source`). `run` returns after a drain; it raises what ended
    the stage otherwise, and then the process must exit with an error, so that another takes its place.
    """

    def __init__(
        self,
        stage: Stage,
        settings: Settings,
        *,
        source: str,
        consumer: Callable[[dict[str, Any]], Consumer] = Consumer,
        view: Callable[[Settings, str], View] | None = BrokerView,
    ) -> None:
        self._stage, self._settings, self._source = stage, settings, source
        self._make_consumer = consumer
        # Under the classic protocols every assignment is answered for by the member.
        self._view = view(settings, stage.name) if view and settings.group_protocol == "consumer" else None
        self._stop = asyncio.Event()
        self._poller: Poller | None = None
        self._work: Work | None = None
        self._cluster: ClusterCheck | None = None
        self._publisher = Publisher(settings, client_id=settings.replica_name)
        self._in_flight = InFlight(settings.max_in_flight, settings.max_in_flight_bytes)

    async def run(self) -> None:
        """Run the stage. Returns when `stop` was called and what was in flight is settled and committed,
        or `drain_seconds` are over: what is unfinished then stays uncommitted."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        self._publisher.start()
        ledger = Ledger(self._in_flight)
        intake = Intake(self._stage, self._settings, ledger)

        def post(call: Callable[..., object], *args: object) -> None:
            try:
                loop.call_soon_threadsafe(call, *args)
            except RuntimeError:
                log.warning("the loop has ended before the poller")

        def on_end(error: BaseException | None) -> None:
            if ended.done():
                return
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        def take(records: list[Fetched]) -> None:
            try:
                work.take(records)
            except Exception as error:
                # Not the handler's fault, or it would be settled: records would hang here for ever.
                on_end(error)

        def hand_on(records: list[Fetched]) -> None:
            post(take, records)

        def cancel(assignments: Collection[Assignment] | None, after: float) -> None:
            post(loop.call_later, after, work.cancel, assignments)

        poller = self._poller = Poller(
            consumer_config(
                self._settings,
                self._stage.name,
                self._settings.replica_name,
                # A stage that works in batches has time for larger ones.
                gather=self._stage.handle_batch is not None,
            ),
            intake.topics,
            intake,
            ledger,
            stage=self._stage.name,
            revoke_seconds=self._settings.revoke_seconds,
            drain_seconds=self._settings.drain_seconds,
            hand_on=hand_on,
            cancel=cancel,
            ended=lambda error: post(on_end, error),
            view=self._view,
            consumer=self._make_consumer,
        )
        work = self._work = Work(
            self._stage, Render(self._stage, self._source), self._publisher, poller.give_back
        )
        # What the stage writes to as well shows itself once it cannot be published.
        dead = Names(self._settings.topic_prefix).dead(self._stage.name)
        self._cluster = ClusterCheck(self._settings, [*intake.topics, dead])
        self._cluster.start()
        poller.start()
        stopped = asyncio.create_task(self._stop.wait())
        ends: set[asyncio.Future[Any]] = {stopped, ended}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            poller.stop()
            await asyncio.wait({ended}, timeout=self._settings.drain_seconds + _CLOSE_SECONDS)
            if ended.done():
                ended.result()
            else:
                log.warning("the consumer did not close in time; its partitions wait for its session to end")
        finally:
            stopped.cancel()
            self._cluster.stop()
            poller.stop()
            work.cancel(None)
            await work.ended(_CANCEL_SECONDS)
            if self._stage.close is not None:
                await self._stage.close()
            await self._publisher.close(1.0)

    async def publish(self, events: Sequence[Event], traceparent: bytes | None = None) -> None:
        """Publish events that must be on record before a handler goes on, ahead of its outcome.

        Returns once all are acked; what is not is published again for as long as the caller waits.
        Raises ValueError where Kafka would refuse an event every time.
        """
        batch = [encode(event, self._source, traceparent) for event in events]
        failures = metrics.STAGE_PUBLISH_FAILURES.labels(self._stage.name)
        while failed := await self._publisher.attempt(batch):
            failures.inc()
            for _, error in failed:
                if hopeless(error):
                    raise ValueError(f"an event cannot be published: {error}")
            await asyncio.sleep(1)

    def saturated(self) -> bool:
        """Return whether more than half of what may be held is held: the slow then hold up the rest."""
        return self._in_flight.over_half()

    def stop(self) -> None:
        """Begin to drain. Call on the loop's thread; does not block."""
        self._stop.set()

    def ready(self) -> bool:
        """Return whether the stage is in its group and nothing keeps it from getting on."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Return what keeps the stage from getting on, empty when nothing does. Safe from any thread."""
        if self._poller is None or self._work is None or self._cluster is None:
            return ["not started"]
        problems = [*self._cluster.problems(), *self._poller.problems(), *self._work.problems()]
        if self._stop.is_set():
            problems.append("draining")
        return problems
