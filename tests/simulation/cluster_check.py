"""The stage's ClusterCheck, without a cluster to check."""

from __future__ import annotations

from typing import Any

from services.common.kafka import cluster_check

__all__ = ["ClusterCheck"]


class ClusterCheck(cluster_check.ClusterCheck):
    """Replaces services.common.kafka.cluster_check.ClusterCheck, and reports no problems."""

    def __init__(self, *_: Any) -> None:
        pass

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""
