"""The metrics of the api, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.common.stage.metrics import LATENCY_BUCKETS

__all__ = [
    "API_DENIED",
    "API_PUBLISHED",
    "API_REQUESTS",
    "API_SECONDS",
    "OUTBOX_DUE",
    "OUTBOX_HELD",
    "OUTBOX_OLDEST_SECONDS",
    "WATCHERS",
    "WATCH_HELD",
    "WATCH_MESSAGES",
    "WATCH_SECONDS",
]

API_REQUESTS = Counter("postroad_api_requests_total", "RPCs answered, by gRPC status code", ["rpc", "code"])
API_SECONDS = Histogram("postroad_api_seconds", "Time to answer an RPC", ["rpc"], buckets=LATENCY_BUCKETS)
API_DENIED = Counter("postroad_api_denied_total", "Calls that no token or certificate allows", ["reason"])
API_PUBLISHED = Counter(
    "postroad_api_published_total",
    "Events published, by way: relay (the outbox publisher, at once) or sweeper (scheduled, or after a"
    " crash or an outage)",
    ["way"],
)
OUTBOX_HELD = Gauge(
    "postroad_api_relay_held_tasks", "Events that the outbox publisher holds until they leave the outbox"
)
OUTBOX_DUE = Gauge(
    "postroad_api_outbox_due_rows", "Due events in the outbox; all replicas show the same number"
)
OUTBOX_OLDEST_SECONDS = Gauge(
    "postroad_api_outbox_oldest_due_seconds", "Age of the oldest due event in the outbox: alert on it"
)
WATCHERS = Gauge("postroad_api_watchers", "Watch streams that are open")
WATCH_MESSAGES = Counter("postroad_api_watch_messages_total", "Messages written to Watch streams")
WATCH_HELD = Gauge("postroad_api_watch_held_changes", "Changes that wait for an earlier event of their task")
WATCH_SECONDS = Histogram(
    "postroad_api_watch_seconds",
    "Time from a change's record to its dispatch to the watchers",
    buckets=LATENCY_BUCKETS,
)
