"""The errors of Watch, besides those of every RPC."""

from __future__ import annotations

import grpc

from services.api.errors import StatusError, error_info, retry_info

__all__ = ["kafka_unavailable", "resume_token_expired", "too_many_watchers", "watcher_lags"]


def too_many_watchers() -> StatusError:
    """Return RESOURCE_EXHAUSTED: this replica has as many watchers as it may have."""
    text = "this replica has too many watchers"
    return _transient(grpc.StatusCode.RESOURCE_EXHAUSTED, text, "TOO_MANY_WATCHERS", 5)


def watcher_lags() -> StatusError:
    """Return RESOURCE_EXHAUSTED: the client reads its messages too slowly. It may resume."""
    text = "too many messages wait for this client; resume with the last resume_token"
    return _transient(grpc.StatusCode.RESOURCE_EXHAUSTED, text, "WATCHER_LAGS", 1)


def kafka_unavailable() -> StatusError:
    """Return UNAVAILABLE: Kafka does not answer."""
    return _transient(grpc.StatusCode.UNAVAILABLE, "Kafka does not answer", "KAFKA_UNAVAILABLE", 2)


def resume_token_expired() -> StatusError:
    """Return OUT_OF_RANGE: the topics no longer have the records after a resume token."""
    text = "the changes after this resume_token are no longer kept; List the tasks, and watch without a token"
    return StatusError(grpc.StatusCode.OUT_OF_RANGE, text, (error_info("RESUME_TOKEN_EXPIRED"),))


def _transient(code: grpc.StatusCode, text: str, reason: str, retry_seconds: int) -> StatusError:
    return StatusError(code, text, (error_info(reason), retry_info(retry_seconds)))
