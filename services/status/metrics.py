"""The metrics of the status service, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter

__all__ = ["STATUS_BODIES_PURGED"]

STATUS_BODIES_PURGED = Counter(
    "postroad_status_bodies_purged_total", "Bodies of settled tasks deleted after their retention"
)
