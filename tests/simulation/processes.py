"""The services, put together as their service.py does, over the in-memory ports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from itertools import count
from typing import Any

from services.api import outbox
from services.api.database_threads import DatabaseThreads
from services.api.decider import Decider
from services.api.outbox import NewTask, OutboxRow
from services.api.outbox_publisher import OutboxPublisher
from services.api.outbox_sweeper import Sweeper
from services.api.recorder import Recorder
from services.common.batching import Batcher
from services.common.config import Settings
from services.common.database.errors import is_transient
from services.common.events import Event
from services.common.stage.runtime import StageRuntime
from services.common.stage.types import Stage
from services.common.stages import STAGES
from services.sender.async_claims import AsyncClaims
from services.sender.composer import Composer
from services.sender.leases import Leases
from services.sender.policy import Policy
from services.sender.slots import Slots
from services.sender.stage import Sender
from services.sender.stage import stage as sender_stage
from services.status.stage import StatusHandler
from services.status.stage import stage as status_stage
from services.validator.cache import VerdictCache
from services.validator.stage import Validator
from tests.simulation.broker import Broker
from tests.simulation.consumer import Consumer
from tests.simulation.database import Database, MemoryClaims
from tests.simulation.loop import Loop
from tests.simulation.mail import Dns, MailServer, Pool
from tests.simulation.process import Process
from tests.simulation.publisher import Publisher
from tests.simulation.scheduler import EPOCH, here

__all__ = ["SERVICES", "SETTINGS", "SIMULATED", "Api", "Servers", "Service", "build"]

SETTINGS = {
    hold: Settings.model_construct(
        validator_delays=(5, 30),
        sender_delays=(20, 60),
        sender_max_age=3600,
        on_uncertain="hold" if hold else "resend",
        partitions=2,
    )
    for hold in (False, True)
}
_tokens = count()


class Servers:
    """The servers that all processes use."""

    def __init__(
        self, broker: Broker, database: Database, mail: MailServer, dns: Dns, settings: Settings
    ) -> None:
        self.broker, self.database, self.mail, self.dns = broker, database, mail, dns
        self.settings = settings


class Service:
    """A stage's service. `consumers` are those that its process has made."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.consumers: list[Consumer] = []
        self.runtime: StageRuntime

    def _runtime(self, stage: Stage) -> StageRuntime:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)

        def make(config: dict[str, Any]) -> Consumer:
            self.consumers.append(Consumer(self.servers.broker, loop.process, config))
            return self.consumers[-1]

        return StageRuntime(
            stage,
            self.servers.settings,
            source=stage.name,
            consumer=make,  # type: ignore[arg-type]
            view=None,
        )

    async def run(self) -> None:
        """Serve until stopped."""
        await self.runtime.run()

    def stop(self) -> None:
        """Begin to drain."""
        self.runtime.stop()


class ValidatorService(Service):
    def __init__(self, servers: Servers) -> None:
        super().__init__(servers)
        delays = servers.settings.validator_delays
        cache = VerdictCache(servers.dns, lambda: here().now, transient_ttl=0.9 * min(delays))
        validator = Validator(cache, delays, _now_us)
        self.runtime = self._runtime(Stage.of(STAGES["validator"], handle_all=validator, delays=delays))


class StatusService(Service):
    def __init__(self, servers: Servers) -> None:
        super().__init__(servers)
        self.runtime = self._runtime(status_stage(StatusHandler(servers.database)))  # type: ignore[arg-type]


class SenderService(Service):
    def __init__(self, servers: Servers) -> None:
        super().__init__(servers)
        settings = servers.settings
        hold = settings.on_uncertain == "hold"
        self._claims = AsyncClaims(
            MemoryClaims(servers.database, settings.lease_seconds, hold, settings.max_resends)
        )
        self._leases = Leases(self._claims.renew, settings.lease_seconds, clock=_monotonic)
        self._sender = Sender(
            claims=self._claims,
            leases=self._leases,
            pool=Pool(servers.mail),
            composer=Composer("shop@postroad.test"),
            policy=Policy(settings.sender_delays, settings.sender_max_age, hold, settings.max_resends),
            claim_slots=Slots(4, 0),
            session_slots=Slots(2, 1),
            publish=self._publish,
            owner=lambda: next(_tokens).to_bytes(16, "big"),
            handover=settings.handover_seconds,
            now_us=_now_us,
            rng=here().rng,
        )
        self.runtime = self._runtime(sender_stage(self._sender, settings.sender_delays))

    async def _publish(self, events: Sequence[Event], traceparent: bytes | None) -> None:
        await self.runtime.publish(events, traceparent)

    async def run(self) -> None:
        renewing = asyncio.create_task(self._leases.run())
        try:
            await self.runtime.run()
        finally:
            renewing.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._claims.close()


class _Sweeper(Sweeper):
    """Sleeps while no outbox row is due, since such a sweep changes nothing."""

    async def _pause(self, seconds: float) -> None:
        database: Database = self._engine  # type: ignore[assignment]
        await super()._pause(seconds)
        while not self._stopping.is_set():
            due = min(database.outbox.values(), default=None)
            wait = due - here().now if due is not None else None
            if wait is not None and wait <= 0:
                return
            changed = asyncio.Event()
            database.outbox_changed.append(changed.set)
            try:
                async with asyncio.timeout(wait):
                    await changed.wait()
            except TimeoutError:
                return
            finally:
                database.outbox_changed.remove(changed.set)


class Api:
    """The api without gRPC: recorder, decider, outbox publisher and sweeper."""

    def __init__(self, servers: Servers) -> None:
        self._loop = asyncio.get_running_loop()
        database: Any = servers.database
        self._database = database
        publisher: Any = Publisher(servers.settings)
        self._deleter: Batcher[OutboxRow, None] = Batcher(self._delete, shared=is_transient, name="outbox")
        self._outbox_publisher = OutboxPublisher(publisher, self._deleter, 100, 1 << 20)
        self.recorder = Recorder(database, self._committed, 100, 1 << 20)
        self.decider = Decider(DatabaseThreads(database), self._outbox_publisher.publish)
        self._sweeper = _Sweeper(database, publisher, self._outbox_publisher, 10)

    async def run(self) -> None:
        """Serve until stopped."""
        await self._sweeper.run()
        await self.recorder.close()
        await self._outbox_publisher.drain(10)
        await self._deleter.close()

    def stop(self) -> None:
        """Begin to drain."""
        self._sweeper.stop()

    def _committed(self, recorded: Sequence[NewTask]) -> None:
        self._loop.call_soon_threadsafe(self._outbox_publisher.publish, recorded)

    def _delete(self, rows: Sequence[OutboxRow]) -> list[None]:
        self._database.transact(lambda database: outbox.delete(database, rows))
        return [None] * len(rows)


SIMULATED: dict[str, type[Service]] = {
    "validator": ValidatorService,
    "sender": SenderService,
    "status": StatusService,
}
"""The stages that have in-memory ports. A schedule leaves out any other stage of the list."""
SERVICES = ("api", *SIMULATED)


def build(process: Process, servers: Servers) -> Service | Api:
    """Return the service of a process. Called on its loop."""
    return Api(servers) if process.service == "api" else SIMULATED[process.service](servers)


def _monotonic() -> float:
    return here().now + 1000


def _now_us() -> int:
    return EPOCH * 1_000_000 + int(here().now * 1e6)
