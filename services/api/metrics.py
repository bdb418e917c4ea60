"""The metrics of the api, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.common.stage.metrics import LATENCY_BUCKETS

__all__ = [
    "API_PUBLISHED",
    "API_RELAY_HELD",
    "API_REQUESTS",
    "API_SECONDS",
    "OUTBOX_DUE",
    "OUTBOX_OLDEST_SECONDS",
    "WATCHERS",
    "WATCH_HELD",
    "WATCH_MESSAGES",
    "WATCH_SECONDS",
]

API_REQUESTS = Counter("postroad_api_requests_total", "RPCs answered, by gRPC status code", ["rpc", "code"])
API_SECONDS = Histogram("postroad_api_seconds", "Time to answer an RPC", ["rpc"], buckets=LATENCY_BUCKETS)
API_PUBLISHED = Counter(
    "postroad_api_published_total",
    "Recorded tasks published, by way: relay (at once) or sweeper (left behind by a crash or an outage)",
    ["way"],
)
API_RELAY_HELD = Gauge("postroad_api_relay_held_tasks", "Recorded tasks that are being published")
OUTBOX_DUE = Gauge(
    "postroad_api_outbox_due_rows", "Events in the outbox that are due; all replicas show the same"
)
OUTBOX_OLDEST_SECONDS = Gauge(
    "postroad_api_outbox_oldest_due_seconds", "Time since the first of them became due: alert on it"
)
WATCHERS = Gauge("postroad_api_watchers", "Watch streams that are open")
WATCH_MESSAGES = Counter("postroad_api_watch_messages_total", "Messages written to Watch streams")
WATCH_HELD = Gauge(
    "postroad_api_watch_held_changes", "Changes read that wait for what happened to their task before"
)
WATCH_SECONDS = Histogram(
    "postroad_api_watch_seconds",
    "Time from a change's record to its being told to those who watch",
    buckets=LATENCY_BUCKETS,
)
