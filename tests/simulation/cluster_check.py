"""The stage's ClusterCheck without a cluster."""

from __future__ import annotations

from typing import Any

from services.common.kafka import cluster_check

__all__ = ["ClusterCheck"]


class ClusterCheck(cluster_check.ClusterCheck):
    """Takes the place of services.common.kafka.cluster_check.ClusterCheck; asks nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def start(self) -> None:
        """Nothing has to be."""

    def stop(self) -> None:
        """Nothing runs."""
