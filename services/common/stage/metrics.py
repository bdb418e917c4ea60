"""The metrics of the stage runtime, labelled by stage, for Prometheus.

The api counts its failed publishes here too, as the stage `api`, and shares the buckets. Names follow
Prometheus' conventions: base units, and `_total` on counters.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

__all__ = [
    "LATENCY_BUCKETS",
    "STAGE_BATCH_SECONDS",
    "STAGE_COMMIT_FAILURES",
    "STAGE_HELD",
    "STAGE_IN_FLIGHT",
    "STAGE_IN_FLIGHT_BYTES",
    "STAGE_PARTITIONS",
    "STAGE_PAUSED",
    "STAGE_PUBLISH_FAILURES",
    "STAGE_REBALANCES",
    "STAGE_RECORDS",
]

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Upper bounds (seconds) of the buckets of every histogram of times."""

STAGE_RECORDS = Counter(
    "postroad_stage_records_total", "Records finished, by how: done, retry or dead", ["stage", "outcome"]
)
STAGE_IN_FLIGHT = Gauge("postroad_stage_in_flight_records", "Records fetched and not finished", ["stage"])
STAGE_IN_FLIGHT_BYTES = Gauge(
    "postroad_stage_in_flight_bytes", "Bytes of records fetched and not finished", ["stage"]
)
STAGE_PARTITIONS = Gauge("postroad_stage_partitions", "Partitions owned", ["stage"])
STAGE_PAUSED = Gauge("postroad_stage_paused", "1 while intake is paused by the in-flight bound", ["stage"])
STAGE_REBALANCES = Counter(
    "postroad_stage_rebalances_total", "Changes of ownership: assigned, revoked or lost", ["stage", "kind"]
)
STAGE_COMMIT_FAILURES = Counter("postroad_stage_commit_failures_total", "Commits that failed", ["stage"])
STAGE_PUBLISH_FAILURES = Counter(
    "postroad_stage_publish_failures_total",
    "Publishes of a stage or the api that failed and are tried again; while it rises, a stage's commits wait",
    ["stage"],
)
STAGE_BATCH_SECONDS = Histogram(
    "postroad_stage_batch_seconds",
    "Time of the handler over one batch; of handlers that wait, only until they first do",
    ["stage"],
    buckets=LATENCY_BUCKETS,
)
STAGE_HELD = Gauge(
    "postroad_stage_held_partitions", "Partitions of delay topics whose head is not yet due", ["stage"]
)
