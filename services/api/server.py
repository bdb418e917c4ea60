"""The gRPC server: tasks, health and reflection on one port."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from postroad.v1 import task_service_pb2_grpc
from services.api import reflection
from services.api.interceptor import SERVICE, RequestInterceptor
from services.api.task_service import TaskServicer

__all__ = ["make_server"]

# A batch of 1,000 tasks may have 32 KiB a task. The limit is far above any single body, so that the api
# itself refuses one that is too large, by its field. gRPC refuses a larger message with RESOURCE_EXHAUSTED.
_MAX_MESSAGE = 32 << 20

_OPTIONS = [
    # Two replicas on one port are a mistake, which must fail instead of splitting the clients.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", -1),
    # Clients behind load balancers ping to keep their connections.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The server pings too, and so detects a watcher that disappeared without closing its connection.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


def make_server(
    listen: str,
    task_service: TaskServicer,
    interceptor: RequestInterceptor,
    health_servicer: health.aio.HealthServicer,
) -> tuple[grpc.aio.Server, int]:
    """Return a server that is bound to `listen` but not started, and its port.

    `listen` is host:port; port 0 selects a free one. Called on the event loop. Raises OSError where the port
    is taken.
    """
    server = grpc.aio.server(interceptors=(interceptor,), options=_OPTIONS)
    task_service_pb2_grpc.add_TaskServiceServicer_to_server(task_service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable((SERVICE, health.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}: {error}") from None
    return server, port
