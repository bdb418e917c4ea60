"""The metrics of the validator, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from services.common.stage.metrics import LATENCY_BUCKETS

__all__ = ["VALIDATOR_LOOKUP_SECONDS", "VALIDATOR_VERDICTS"]

VALIDATOR_VERDICTS = Counter(
    "postroad_validator_verdicts_total", "Tasks judged, by verdict: ok or the reason", ["verdict"]
)
VALIDATOR_LOOKUP_SECONDS = Histogram(
    "postroad_validator_lookup_seconds",
    "Time to look up a domain that was not in the cache",
    buckets=LATENCY_BUCKETS,
)
