"""What ends a Watch or keeps it from beginning, beside what every RPC answers."""

from __future__ import annotations

import grpc

from services.api.errors import StatusError, error_info, retry_info

__all__ = ["crowded", "gone", "lagging", "silent"]


def crowded() -> StatusError:
    """Return RESOURCE_EXHAUSTED: as many watch this replica as may."""
    text = "too many watch this replica"
    return _passing(grpc.StatusCode.RESOURCE_EXHAUSTED, text, "TOO_MANY_WATCHERS", 5)


def lagging() -> StatusError:
    """Return RESOURCE_EXHAUSTED: the client takes its messages too slowly; it may resume."""
    text = "too many messages wait to be taken; go on from the last resume_token"
    return _passing(grpc.StatusCode.RESOURCE_EXHAUSTED, text, "WATCHER_LAGS", 1)


def silent() -> StatusError:
    """Return UNAVAILABLE: Kafka does not answer."""
    return _passing(grpc.StatusCode.UNAVAILABLE, "Kafka does not answer", "KAFKA_UNAVAILABLE", 2)


def gone() -> StatusError:
    """Return OUT_OF_RANGE: what follows a resume token is not on the topics any more."""
    text = "changes after this resume_token are no longer kept; List what there is, and watch without it"
    return StatusError(grpc.StatusCode.OUT_OF_RANGE, text, (error_info("RESUME_TOKEN_EXPIRED"),))


def _passing(code: grpc.StatusCode, text: str, reason: str, seconds: int) -> StatusError:
    return StatusError(code, text, (error_info(reason), retry_info(seconds)))
