"""What ends a Watch or keeps it from beginning, beside what every RPC answers."""

from __future__ import annotations

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from services.api.errors import DOMAIN, Problem

__all__ = ["crowded", "gone", "lagging", "silent"]


def crowded() -> Problem:
    """Return RESOURCE_EXHAUSTED: as many watch this replica as may."""
    text = "too many watch this replica"
    return _passing(grpc.StatusCode.RESOURCE_EXHAUSTED, text, "TOO_MANY_WATCHERS", 5)


def lagging() -> Problem:
    """Return RESOURCE_EXHAUSTED: the client takes its messages too slowly; it may resume."""
    text = "too many messages wait to be taken; go on from the last resume_token"
    return _passing(grpc.StatusCode.RESOURCE_EXHAUSTED, text, "WATCHER_LAGS", 1)


def silent() -> Problem:
    """Return UNAVAILABLE: Kafka does not answer."""
    return _passing(grpc.StatusCode.UNAVAILABLE, "Kafka does not answer", "KAFKA_UNAVAILABLE", 2)


def gone() -> Problem:
    """Return OUT_OF_RANGE: what follows a resume token is not on the topics any more."""
    text = "changes after this resume_token are no longer kept; List what there is, and watch without it"
    return Problem(grpc.StatusCode.OUT_OF_RANGE, text, (_info("RESUME_TOKEN_EXPIRED"),))


def _passing(code: grpc.StatusCode, text: str, reason: str, seconds: int) -> Problem:
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=seconds))
    return Problem(code, text, (_info(reason), retry))


def _info(reason: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
