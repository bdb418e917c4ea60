"""Runs one stage: wires the poller's thread and the handler runner's loop together, from start to drain."""

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
from services.common.kafka.pace import awaited_fetches, gathered_fetches, gathered_records
from services.common.kafka.publisher import Publisher, is_permanent
from services.common.kafka.topics import Names
from services.common.stage import metrics
from services.common.stage.coordinator_view import CoordinatorView
from services.common.stage.handler_runner import HandlerRunner
from services.common.stage.in_flight_limit import InFlightLimit
from services.common.stage.in_flight_record import Assignment, InFlightRecord
from services.common.stage.membership import OwnershipView
from services.common.stage.outcome_encoder import OutcomeEncoder
from services.common.stage.partition_tracker import PartitionTracker
from services.common.stage.poller import Poller
from services.common.stage.record_reader import RecordReader
from services.common.stage.types import Stage
from services.common.stages import STAGES

__all__ = ["StageRuntime"]

log = structlog.get_logger(__name__)

# Seconds beyond the drain for the last commit and for leaving the group.
_CLOSE_SECONDS = 15.0
# Seconds that a cancelled handler may take to end.
_CANCEL_SECONDS = 5.0


class StageRuntime:
    """Runs one stage until it is stopped. Use it on one event loop.

    `source` names the stage in its events (`ce_source`). `run` returns after a drain. It raises what else
    ended the stage; the process must then exit with an error, so that another one takes its place.
    """

    def __init__(
        self,
        stage: Stage,
        settings: Settings,
        *,
        source: str,
        consumer: Callable[[dict[str, Any]], Consumer] = Consumer,
        view: Callable[[Settings, str], OwnershipView] | None = CoordinatorView,
    ) -> None:
        self._stage, self._settings, self._source = stage, settings, source
        self._make_consumer = consumer
        # Under the classic protocol the member itself confirms every assignment: there is nothing to compare.
        self._view = view(settings, stage.name) if view and settings.group_protocol == "consumer" else None
        self._stop = asyncio.Event()
        self._poller: Poller | None = None
        self._runner: HandlerRunner | None = None
        self._cluster: ClusterCheck | None = None
        spec = STAGES.get(stage.name)
        pace = gathered_records() if spec is not None and not spec.awaited else None
        self._publisher = Publisher(settings, client_id=settings.replica_name, pace=pace)
        self._in_flight = InFlightLimit(settings.max_in_flight, settings.max_in_flight_bytes)

    async def run(self) -> None:
        """Run the stage until `stop`, and drain it.

        After the drain all records in flight are finished and committed. After `drain_seconds` the unfinished
        ones stay uncommitted, for their partition's next owner.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        self._publisher.start()
        tracker = PartitionTracker(self._in_flight)
        reader = RecordReader(self._stage, self._settings, tracker)

        def post(call: Callable[..., object], *args: object) -> None:
            try:
                loop.call_soon_threadsafe(call, *args)
            except RuntimeError:
                log.warning("the event loop ended before the poller")

        def on_end(error: BaseException | None) -> None:
            if ended.done():
                return
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        def start(records: list[InFlightRecord]) -> None:
            try:
                runner.start(records)
            except Exception as error:
                # A handler's own error is an outcome. Any other would leave these records in flight.
                on_end(error)

        def dispatch(records: list[InFlightRecord]) -> None:
            post(start, records)

        def cancel(assignments: Collection[Assignment] | None, after: float) -> None:
            post(loop.call_later, after, runner.cancel, assignments)

        # A stage that works in batches has time for larger ones.
        gather = self._stage.handle_batch is not None
        poller = self._poller = Poller(
            consumer_config(self._settings, self._stage.name, self._settings.replica_name, gather=gather),
            reader.topics,
            reader,
            tracker,
            stage=self._stage.name,
            pace=gathered_fetches() if gather else awaited_fetches(),
            revoke_seconds=self._settings.revoke_seconds,
            drain_seconds=self._settings.drain_seconds,
            dispatch=dispatch,
            cancel=cancel,
            ended=lambda error: post(on_end, error),
            view=self._view,
            consumer=self._make_consumer,
        )
        runner = self._runner = HandlerRunner(
            self._stage, OutcomeEncoder(self._stage, self._source), self._publisher, poller.release
        )
        # The stage writes its dead letters rarely. It would miss any other topic when it publishes.
        dead = Names(self._settings.topic_prefix).dead(self._stage.name)
        self._cluster = ClusterCheck(self._settings, [*reader.topics, dead])
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
            runner.cancel(None)
            await runner.wait_cancelled(_CANCEL_SECONDS)
            if self._stage.close is not None:
                await self._stage.close()
            await self._publisher.close(1.0)

    async def publish(self, events: Sequence[Event], traceparent: bytes | None = None) -> None:
        """Publish events that must be on Kafka before a handler goes on, ahead of its outcome.

        Return once all are acked; publish again what failed, for as long as the caller waits. Raise
        ValueError where Kafka would refuse an event every time.
        """
        batch = [encode(event, self._source, traceparent) for event in events]
        failures = metrics.STAGE_PUBLISH_FAILURES.labels(self._stage.name)
        while failed := await self._publisher.publish(batch):
            failures.inc()
            for _, error in failed:
                if is_permanent(error):
                    raise ValueError(f"an event cannot be published: {error}")
            await asyncio.sleep(1)

    def over_half(self) -> bool:
        """Return whether more than half of what may be in flight is: slow records then hold up the others."""
        return self._in_flight.over_half()

    def stop(self) -> None:
        """Begin to drain. Call on the loop's thread; does not block."""
        self._stop.set()

    def ready(self) -> bool:
        """Return whether the stage is in its group and nothing keeps it from progress."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Return what keeps the stage from progress, empty where nothing does. Safe from any thread."""
        if self._poller is None or self._runner is None or self._cluster is None:
            return ["not started"]
        problems = [*self._cluster.problems(), *self._poller.problems(), *self._runner.problems()]
        if self._stop.is_set():
            problems.append("draining")
        return problems
