"""The api service: builds its parts, runs them, and drains them in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog

from services.api import outbox
from services.api.access import Access
from services.api.database_threads import THREADS, DatabaseThreads
from services.api.decider import Decider
from services.api.health import HealthServicer
from services.api.interceptor import RequestInterceptor
from services.api.outbox import NewTask, OutboxRow
from services.api.outbox_backlog import OutboxBacklog
from services.api.outbox_publisher import OutboxPublisher
from services.api.outbox_sweeper import Sweeper
from services.api.readiness import Readiness
from services.api.recorder import Recorder
from services.api.server import make_server
from services.api.task_service import TaskServicer
from services.api.token_keys import token_keys
from services.api.watch.watch_service import WatchService
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

_REFUSAL_TIME = 0.2
_STREAM_GRACE = 1.0
_MAX_SWEPT = 500
_MAX_DELETED = 2000
# The recorder uses two, the deleter, the sweeper, the readiness and the backlog one each, one ends abandoned
# queries, and the decider uses as many as it has threads.
_CONNECTIONS = 7 + THREADS
# The server ends a query before its caller gives it up (seconds).
_QUERY_SECONDS = 4.0


class ApiService:
    """The api in its process. Made on the event loop.

    Raises OSError where its port is taken. Raises ValueError for tokens, certificates, a listener or a
    database URL that it cannot accept.
    """

    def __init__(self, settings: Settings) -> None:
        self._drain_seconds = settings.drain_seconds
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._access = Access(settings)
        with refused("database_url"):
            url = url_of(settings.database_url.get_secret_value())
        with refused("token_keys"):
            keys = token_keys(settings.token_keys.get_secret_value(), url)
        self._engine = make_engine(url, _CONNECTIONS)
        self._publisher = Publisher(settings, "postroad.api")
        self._deleter: Batcher[OutboxRow, None] = Batcher(
            self._delete, _MAX_DELETED, shared=is_transient, name="outbox"
        )
        max_count, max_bytes = settings.max_in_flight, settings.max_in_flight_bytes
        self._outbox_publisher = OutboxPublisher(self._publisher, self._deleter, max_count, max_bytes)
        self._recorder = Recorder(self._engine, self._on_commit, settings.max_pending_creates, max_bytes)
        self._sweeper = Sweeper(self._engine, self._publisher, self._outbox_publisher, _MAX_SWEPT)
        self._query_engine = make_engine(url, THREADS, query_seconds=_QUERY_SECONDS)
        self._query_threads = DatabaseThreads(self._query_engine, killing=self._engine)
        self._decider_threads = DatabaseThreads(self._engine)
        decider = Decider(self._decider_threads, self._outbox_publisher.publish)
        self._health = HealthServicer()
        self._readiness = Readiness(self._engine, self._health)
        self._backlog = OutboxBacklog(self._engine)
        # The api publishes to some of these topics, and Watch reads all.
        names = Names(settings.topic_prefix)
        self._cluster = ClusterCheck(settings, [names.topic(name) for name in EVENT_TOPICS])
        self._watch_service = WatchService(settings, self._query_threads, keys)
        task_service = TaskServicer(
            self._recorder,
            self._query_threads,
            decider,
            self._watch_service,
            max_body=settings.max_body,
            keys=keys,
            allowed_headers=settings.allowed_headers,
            partitions=settings.partitions,
        )
        self._interceptor = RequestInterceptor(
            self._access.authenticator, self._access.streams, self._recorder.admit_batch
        )
        self._server, self.port = make_server(
            settings.listen,
            task_service,
            self._interceptor,
            self._health,
            accept_compression=settings.accept_compression,
            reflect=self._access.reflect,
            credentials=self._access.credentials(),
        )

    async def run(self) -> None:
        """Serve until stopped. Then answer the calls in flight and publish what they recorded.

        Raises RuntimeError where the producer has failed for good; the process must then restart.
        """
        self._publisher.start()
        await self._server.start()
        log.info("serving", port=self.port)
        self._access.log()
        sweeping = asyncio.create_task(self._sweeper.run())
        readiness = asyncio.create_task(self._readiness.run())
        backlog = asyncio.create_task(self._backlog.run())
        access = asyncio.create_task(self._access.run())
        self._cluster.start()
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((sweeping, readiness, access, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        readiness.cancel()
        backlog.cancel()
        access.cancel()
        self._cluster.stop()
        await self._drain(sweeping)
        for task in (sweeping, readiness, access):
            if task.done() and not task.cancelled():
                task.result()

    def stop(self) -> None:
        """Begin to drain."""
        self._stopping.set()

    def problems(self) -> list[str]:
        """Return why the api is not ready: it drains, or the database does not answer.

        Without Kafka or one of its topics the api is only degraded, because Create still works.
        """
        problems = (["draining"] if self._stopping.is_set() else []) + self._readiness.problems()
        problems += map(Degraded, self._cluster.problems())
        return [*problems, *self._backlog.problems(), *self._access.problems()]

    async def _drain(self, sweeping: asyncio.Task[None]) -> None:
        deadline = time.monotonic() + self._drain_seconds
        self._health.drain()
        self._interceptor.drain()
        self._watch_service.drain()
        # `stop` cancels calls that gRPC has not dispatched yet. They get UNAVAILABLE before that.
        await asyncio.sleep(_REFUSAL_TIME)
        await self._interceptor.answered(self._drain_seconds)
        # A watcher that reads no messages would never end its stream by itself.
        await self._server.stop(_STREAM_GRACE)
        await self._watch_service.close()
        await self._recorder.close()
        self._sweeper.stop()
        await self._outbox_publisher.drain(max(0.1, deadline - time.monotonic()))
        # While Kafka is away the sweep cannot finish. Its events stay in the outbox.
        await asyncio.wait((sweeping,), timeout=max(1.0, deadline - time.monotonic()))
        sweeping.cancel()
        await self._publisher.close(max(0.1, deadline - time.monotonic()))
        await self._deleter.close()
        self._query_threads.close()
        self._decider_threads.close()
        self._query_engine.dispose()
        self._engine.dispose()

    def _on_commit(self, new_tasks: Sequence[NewTask]) -> None:
        self._loop.call_soon_threadsafe(self._outbox_publisher.publish, new_tasks)

    def _delete(self, rows: Sequence[OutboxRow]) -> list[None]:
        transaction(self._engine, lambda connection: outbox.delete(connection, rows))
        return [None] * len(rows)


async def build(settings: Settings) -> ApiService:
    """Return the api, ready to run; raises what ApiService raises."""
    return ApiService(settings)
