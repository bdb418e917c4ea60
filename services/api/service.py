"""The service: its parts put together, run, and taken down in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog
from grpc_health.v1 import health

from services.api import outbox
from services.api.auth import Tenants
from services.api.backlog import Backlog
from services.api.decider import Decider
from services.api.handlers import SERVICE, TaskService
from services.api.outbox import Item
from services.api.reader import THREADS, Reader
from services.api.readiness import Readiness
from services.api.recorder import Recorder
from services.api.relay import Creation, Relay
from services.api.server import serve_on
from services.api.sweeper import Sweeper
from services.api.watch.watching import Watches
from services.common.batching import Batcher
from services.common.config import Settings, refused
from services.common.database.engine import make_engine, url_of
from services.common.database.errors import is_transient
from services.common.database.transactions import transaction
from services.common.health import Degraded
from services.common.kafka.cluster_check import ClusterCheck
from services.common.kafka.publisher import Publisher
from services.common.kafka.topics import EVENT_TOPICS, Names

__all__ = ["ApiService", "build"]

log = structlog.get_logger(__name__)

_SENDING_AWAY = 0.2
_LAST_WORDS = 1.0
_MOST_SWEPT = 500
# The recorder's two, the settling of the outbox, the sweeper, readiness, backlog, the readers, the deciders.
_CONNECTIONS = 6 + 2 * THREADS


class ApiService:
    """The api as its process runs it; made on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._seconds = settings.drain_seconds
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        with refused("api_tokens"):
            tenants = Tenants(settings.api_tokens.get_secret_value())
        with refused("database_url"):
            url = url_of(settings.database_url)
        self._engine = make_engine(url, _CONNECTIONS)
        self._publisher = Publisher(settings, "postroad.api")
        self._settle: Batcher[Item, None] = Batcher(self._delete, shared=is_transient, name="outbox")
        most, most_bytes = settings.max_in_flight, settings.max_in_flight_bytes
        self._relay = Relay(self._publisher, self._settle, most, most_bytes)
        self._recorder = Recorder(self._engine, self._committed, settings.max_pending_creates, most_bytes)
        self._sweeper = Sweeper(self._engine, self._publisher, self._relay, _MOST_SWEPT)
        self._reader = Reader(self._engine)
        self._deciding = Reader(self._engine)
        decider = Decider(self._deciding, self._relay.publish)
        self._health = health.aio.HealthServicer()
        self._readiness = Readiness(self._engine, self._health, ("", SERVICE))
        self._backlog = Backlog(self._engine)
        # It publishes to some of these, and Watch reads all.
        names = Names(settings.topic_prefix)
        self._cluster = ClusterCheck(settings, [names.topic(name) for name in EVENT_TOPICS])
        self._watches = watches = Watches(settings, self._reader)
        self._tasks = tasks = TaskService(
            tenants, self._recorder, self._reader, decider, watches=watches, max_body=settings.max_body
        )
        self._server, self.port = serve_on(settings.listen, tasks, self._health)

    async def run(self) -> None:
        """Serve until stopped; then answer what is in flight and publish what was recorded.

        Raises RuntimeError where the producer cannot go on; the process must start anew.
        """
        self._publisher.start()
        await self._server.start()
        log.info("serving", port=self.port)
        sweeping = asyncio.create_task(self._sweeper.run())
        readiness = asyncio.create_task(self._readiness.run())
        backlog = asyncio.create_task(self._backlog.run())
        self._cluster.start()
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((sweeping, readiness, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        readiness.cancel()
        backlog.cancel()
        self._cluster.stop()
        await self._drain(sweeping)
        for task in (sweeping, readiness):
            if task.done() and not task.cancelled():
                task.result()

    def stop(self) -> None:
        """Begin to drain."""
        self._stopping.set()

    def problems(self) -> list[str]:
        """Return why the api is not ready: it drains, or the database is silent.

        While Kafka does not answer or a topic is missing, Create goes on: that makes it degraded.
        """
        problems = (["draining"] if self._stopping.is_set() else []) + self._readiness.problems()
        return [*problems, *map(Degraded, self._cluster.problems()), *self._backlog.problems()]

    async def _drain(self, sweeping: asyncio.Task[None]) -> None:
        deadline = time.monotonic() + self._seconds
        await self._health.enter_graceful_shutdown()
        self._tasks.drain()
        # Closing, gRPC cancels what it has not handed on yet; so clients are sent away before that.
        await asyncio.sleep(_SENDING_AWAY)
        await self._tasks.answered(self._seconds)
        # A watcher that takes no messages does not hear of the end either.
        await self._server.stop(_LAST_WORDS)
        await self._watches.close()
        await self._recorder.close()
        self._sweeper.stop()
        await self._relay.drain(max(0.1, deadline - time.monotonic()))
        # What a sweep has in hand while Kafka is away is in the outbox still.
        await asyncio.wait((sweeping,), timeout=max(1.0, deadline - time.monotonic()))
        sweeping.cancel()
        await self._publisher.close(max(0.1, deadline - time.monotonic()))
        await self._settle.close()
        self._reader.close()
        self._deciding.close()
        self._engine.dispose()

    def _committed(self, recorded: Sequence[Creation]) -> None:
        self._loop.call_soon_threadsafe(self._relay.publish, recorded)

    def _delete(self, items: Sequence[Item]) -> list[None]:
        transaction(self._engine, lambda connection: outbox.delete(connection, items))
        return [None] * len(items)


async def build(settings: Settings) -> ApiService:
    """Return the api, ready to run.

    Raises OSError when its port is taken, ValueError for tokens or a database URL that cannot be used.
    """
    return ApiService(settings)
