"""The gRPC server: tasks, health and, if asked for, reflection on one port."""

from __future__ import annotations

import resource

import grpc

from postroad.v1 import task_service_pb2_grpc
from services.api import reflection
from services.api.health import SERVICE_NAME, HealthServicer
from services.api.interceptor import MAX_BATCH, SERVICE, RequestInterceptor
from services.api.task_service import TaskServicer

__all__ = ["make_server"]

# An idle connection takes 15 KB. Above half of the process's file descriptors, the database could get none.
_MAX_CONNECTIONS = min(3000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

_IDENTITY = 1 << grpc.Compression.NoCompression
_OPTIONS = [
    # Two replicas on one port are a mistake, which must fail instead of splitting the clients.
    ("grpc.so_reuseport", 0),
    # gRPC has one limit for all RPCs. The interceptor has those of each one.
    ("grpc.max_receive_message_length", MAX_BATCH),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", 250),
    ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
    # A new connection has so long for its first frames, and one without calls stays for five minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    # What the library holds for a client that does not read ends with the connection. A Watch resumes.
    ("grpc.max_connection_age_ms", 1_800_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
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
    health_servicer: HealthServicer,
    *,
    accept_compression: bool,
    reflect: bool,
    credentials: grpc.ServerCredentials | None,
) -> tuple[grpc.aio.Server, int]:
    """Return a server that is bound to `listen` but not started, and its port.

    `listen` is host:port; port 0 selects a free one. Without `credentials` it takes plain text. Called on the
    event loop. Raises OSError where the port is taken.
    """
    options = list(_OPTIONS)
    if not accept_compression:
        options.append(("grpc.compression_enabled_algorithms_bitset", _IDENTITY))
    server = grpc.aio.server(interceptors=(interceptor,), options=options)
    task_service_pb2_grpc.add_TaskServiceServicer_to_server(task_service, server)
    server.add_generic_rpc_handlers((health_servicer.handler(),))
    if reflect:
        reflection.enable((SERVICE, SERVICE_NAME), server)
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}: {error}") from None
    return server, port
