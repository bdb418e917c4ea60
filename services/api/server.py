"""The gRPC server: the task service, health and reflection on one port."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from services.api import reflection
from services.api.handlers import SERVICE, TaskService

__all__ = ["serve_on"]

# Far above any body, so that one that is too large gets an answer that says so; a batch of 1,000 may have
# 32 KiB an item. What is larger is refused by gRPC itself, with RESOURCE_EXHAUSTED.
_MAX_MESSAGE = 32 << 20

_OPTIONS = [
    # Two replicas on one port by mistake is an error, not a coin toss.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.max_send_message_length", -1),
    # Clients behind load balancers ping to keep their connections.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A watcher that vanished without a word is noticed, and forgotten.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


def serve_on(
    listen: str, tasks: TaskService, servicer: health.aio.HealthServicer
) -> tuple[grpc.aio.Server, int]:
    """Return a server bound to `listen` (host:port, port 0: any free one), not yet started, and its port.

    To be called on the event loop. Raises OSError where the port is taken.
    """
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((tasks.handler(),))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable((SERVICE, health.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}: {error}") from None
    return server, port
