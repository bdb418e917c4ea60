"""The validator stage: it reads recorded tasks, and publishes the verdict on each recipient's domain."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import inf
from typing import cast
from uuid import UUID

import structlog

from postroad.v1 import events_pb2 as pb
from services.common.stage.types import Done, Finish, Outcome, Record, Retry, Stage
from services.common.stages import STAGES
from services.validator.cache import VerdictCache
from services.validator.metrics import VALIDATOR_VERDICTS
from services.validator.mx import Reason, Verdict, VerdictKind
from services.validator.mx_ok import mx_ok

__all__ = ["Validator", "stage"]

log = structlog.get_logger(__name__)

_OK = VALIDATOR_VERDICTS.labels("ok")
# Seconds before a domain whose lookup was cancelled is looked up again.
_RESTART_PAUSE = 1.0


class Validator:
    """Turns `task.created` into `mx.ok` or `mx.failed`, or defers the record while DNS does not answer.

    It answers at once all records whose domain's verdict is cached. The others of one domain wait for one
    lookup together. `delays` are the seconds before each further attempt, each used once. After the last one
    the task fails as `dns_unavailable`. `now_us` returns microseconds since the Unix epoch. Belongs to one
    event loop.
    """

    def __init__(self, cache: VerdictCache, delays: Sequence[int], now_us: Callable[[], int]) -> None:
        self._cache = cache
        self._delays = delays
        self._now_us = now_us
        self._lookups: dict[asyncio.Task[None], set[Record]] = {}

    def start(self, records: Sequence[Record], finish: Finish) -> None:
        """Finish the records whose verdict is cached, and begin to look up the others' domains."""
        now_us = self._now_us()
        known: list[tuple[Record, Verdict]] = []
        unknown: defaultdict[tuple[str, float], set[Record]] = defaultdict(set)
        for record in records:
            created = cast(pb.TaskCreated, record.event)
            domain = _domain(created.task)
            # A reopened task needs a verdict from after its reopening, when DNS may be repaired.
            max_age = max(0.0, (now_us - created.at_us) / 1e6) if created.epoch else inf
            verdict = self._cache.get(domain, max_age)
            if verdict is None:
                unknown[domain, max_age].add(record)
            else:
                known.append((record, verdict))
        if known:
            finish(self._outcomes(known))
        for (domain, max_age), waiting in unknown.items():
            lookup = asyncio.create_task(self._resolve(domain, max_age, waiting, finish))
            self._lookups[lookup] = waiting
            lookup.add_done_callback(self._lookups.pop)

    def cancel(self, records: Sequence[Record]) -> None:
        """Take these records from the lookups that they wait for. End a lookup for which no record waits."""
        for lookup, waiting in self._lookups.items():
            waiting.difference_update(records)
            if not waiting:
                lookup.cancel()

    async def _resolve(self, domain: str, max_age: float, waiting: set[Record], finish: Finish) -> None:
        while waiting:
            try:
                verdict = await self._cache.resolve(domain, max_age)
                finish(self._outcomes([(record, verdict) for record in waiting]))
                return
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                # The lookup was cancelled, and these records are still to be handled.
                await asyncio.sleep(_RESTART_PAUSE)
            except Exception as error:
                finish([(record, error) for record in waiting])
                return

    def _outcomes(self, judged: Sequence[tuple[Record, Verdict]]) -> list[tuple[Record, Outcome | Exception]]:
        now_us = self._now_us()
        outcomes: list[tuple[Record, Outcome | Exception]] = []
        for record, verdict in judged:
            try:
                outcomes.append((record, self._outcome(record, verdict, now_us)))
            except Exception as error:
                outcomes.append((record, error))
        _OK.inc(sum(verdict.kind is VerdictKind.OK for _, verdict in judged))
        return outcomes

    def _outcome(self, record: Record, verdict: Verdict, now_us: int) -> Outcome:
        created = cast(pb.TaskCreated, record.event)
        if verdict.kind is VerdictKind.OK:
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
    return Stage.of(STAGES["validator"], handle_all=validator, delays=delays)


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
