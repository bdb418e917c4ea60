"""The validator stage: it reads recorded tasks, and publishes the verdict on each recipient's domain."""

import time
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from typing import cast
from uuid import UUID

import structlog

from postroad.v1 import events_pb2 as pb
from services.common.stage.types import Done, Outcome, Record, Retry, Stage
from services.common.stages import STAGES
from services.validator.cache import VerdictCache
from services.validator.metrics import VALIDATOR_VERDICTS
from services.validator.mx import Reason, Verdict, VerdictKind
from services.validator.mx_ok import mx_ok

__all__ = ["Validator", "stage"]

log = structlog.get_logger(__name__)

_OK = VALIDATOR_VERDICTS.labels("ok")


class Validator:
    """Turns `task.created` into `mx.ok` or `mx.failed`, or defers the record while DNS does not answer.

    `delays` are the seconds before each further attempt, each used once. After the last one the task fails as
    `dns_unavailable`. `now_us` returns microseconds since the Unix epoch.
    """

    def __init__(self, cache: VerdictCache, delays: Sequence[int], now_us: Callable[[], int]) -> None:
        self._cache = cache
        self._delays = delays
        self._now_us = now_us

    def handle(self, record: Record) -> Outcome | Awaitable[Outcome]:
        """Return the outcome if the domain's verdict is cached, else a coroutine that looks it up."""
        created = cast(pb.TaskCreated, record.event)
        domain, max_age = _domain(created.task), self._max_age(created)
        verdict = self._cache.get(domain, max_age)
        return self._resolve(record, domain, max_age) if verdict is None else self._outcome(record, verdict)

    async def _resolve(self, record: Record, domain: str, max_age: float) -> Outcome:
        return self._outcome(record, await self._cache.resolve(domain, max_age))

    def _max_age(self, created: pb.TaskCreated) -> float:
        """Return the verdict's age limit: a reopened task needs one from after its reopening, when DNS may
        be repaired."""
        return max(0.0, (self._now_us() - created.at_us) / 1e6) if created.epoch else inf

    def _outcome(self, record: Record, verdict: Verdict) -> Outcome:
        created = cast(pb.TaskCreated, record.event)
        now_us = self._now_us()
        if verdict.kind is VerdictKind.OK:
            _OK.inc()
            return Done([mx_ok(created, record.value, record.attempt, verdict.hosts, now_us)])
        VALIDATOR_VERDICTS.labels(verdict.reason).inc()
        if verdict.kind is VerdictKind.TRANSIENT and record.attempt <= len(self._delays):
            return self._defer(record, verdict, now_us)
        _log("mx failed", record, verdict)
        return Done(
            [
                pb.MxFailed(
                    id=created.task.id,
                    epoch=created.epoch,
                    attempt=record.attempt,
                    reason=cast(Reason, verdict.reason),
                    detail=verdict.detail,
                    at_us=now_us,
                )
            ]
        )

    def _defer(self, record: Record, verdict: Verdict, now_us: int) -> Retry:
        created = cast(pb.TaskCreated, record.event)
        delay = self._delays[record.attempt - 1]
        due_at_ms = -(-now_us // 1000) + delay * 1000
        _log("mx deferred", record, verdict, delay=delay)
        deferred = pb.MailDeferred(
            id=created.task.id,
            epoch=created.epoch,
            attempt=record.attempt,
            stage="validator",
            reason=cast(Reason, verdict.reason),
            next_attempt_at_us=due_at_ms * 1000,
            at_us=now_us,
        )
        return Retry(delay, due_at_ms, verdict.detail, [deferred])


def stage(cache: VerdictCache, delays: Sequence[int]) -> Stage:
    """Return the validator's stage for the runtime; `delays` are in seconds."""
    validator = Validator(cache, delays, lambda: time.time_ns() // 1000)
    return Stage.of(STAGES["validator"], handle=validator.handle, delays=delays)


def _domain(task: pb.MailTask) -> str:
    return task.domain or task.email.rpartition("@")[2]


def _log(what: str, record: Record, verdict: Verdict, **more: object) -> None:
    task = cast(pb.TaskCreated, record.event).task
    log.info(
        what,
        task=str(UUID(bytes=task.id)),
        attempt=record.attempt,
        reason=str(verdict.reason),
        detail=verdict.detail,
        **more,
    )
