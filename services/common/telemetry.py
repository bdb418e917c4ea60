"""Every metric of Postroad and the set-up of its logs.

Metric names follow Prometheus' conventions: base units, `_total` on counters. A log line carries
the task id where there is one, and never a password, a subject or a body.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import structlog
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["configure_logs"]

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

# --- the stage runtime -------------------------------------------------------------------------
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
    "Publishes that failed and are tried again; while it rises, commits wait: alert on it",
    ["stage"],
)
STAGE_HANDLER_SECONDS = Histogram(
    "postroad_stage_batch_seconds",
    "Time of the handler over one batch; of handlers that wait, only until they first do",
    ["stage"],
    buckets=_LATENCY,
)
STAGE_HELD = Gauge(
    "postroad_stage_held_partitions", "Partitions of delay topics whose head is not yet due", ["stage"]
)

# --- the api -----------------------------------------------------------------------------------
API_REQUESTS = Counter("postroad_api_requests_total", "RPCs answered, by gRPC status code", ["rpc", "code"])
API_SECONDS = Histogram("postroad_api_seconds", "Time to answer an RPC", ["rpc"], buckets=_LATENCY)
API_PUBLISHED = Counter(
    "postroad_api_published_total",
    "Recorded tasks published, by way: relay (at once) or sweeper (left behind by a crash or an outage)",
    ["way"],
)
API_RELAY_HELD = Gauge("postroad_api_relay_held_tasks", "Recorded tasks that are being published")
OUTBOX_DUE = Gauge(
    "postroad_api_outbox_due_rows", "Events in the outbox that are due; all replicas show the same"
)
OUTBOX_OLDEST_SECONDS = Gauge(
    "postroad_api_outbox_oldest_due_seconds", "Time since the first of them became due: alert on it"
)
WATCHERS = Gauge("postroad_api_watchers", "Watch streams that are open")
WATCH_MESSAGES = Counter("postroad_api_watch_messages_total", "Messages written to Watch streams")
WATCH_HELD = Gauge(
    "postroad_api_watch_held_changes", "Changes read that wait for what happened to their task before"
)
WATCH_SECONDS = Histogram(
    "postroad_api_watch_seconds",
    "Time from a change's record to its being told to those who watch",
    buckets=_LATENCY,
)

# --- what the others add stands below, under a line that names the service ----------------------

# --- the validator -----------------------------------------------------------------------------
VALIDATOR_VERDICTS = Counter(
    "postroad_validator_verdicts_total", "Tasks judged, by verdict: ok or the reason", ["verdict"]
)
VALIDATOR_LOOKUP_SECONDS = Histogram(
    "postroad_validator_lookup_seconds",
    "Time to look up a domain that was not in the cache",
    buckets=_LATENCY,
)

# --- the status service --------------------------------------------------------------------------
STATUS_BODIES_PURGED = Counter(
    "postroad_status_bodies_purged_total", "Bodies of settled tasks deleted after their retention"
)

# --- the sender --------------------------------------------------------------------------------
SENDER_OUTCOMES = Counter(
    "postroad_sender_outcomes_total",
    "Attempts settled, by how: sent, deferred, failed or uncertain",
    ["outcome"],
)
SENDER_IN_DOUBT = Counter(
    "postroad_sender_in_doubt_total",
    "Mails that may have gone out unknown to anyone, by how: takeover of a dead sender's claim or lost reply",
    ["how"],
)
SENDER_FENCED = Counter(
    "postroad_sender_fenced_total",
    "Outcomes whose claim was lost, by what became of them: late (stored all the same) or fenced",
    ["became"],
)
SENDER_SKIPPED = Counter(
    "postroad_sender_skipped_total",
    "Records that needed no mail, by why: stored (the outcome is known) or stale (overtaken)",
    ["why"],
)
SENDER_CROWDED = Counter(
    "postroad_sender_crowded_total",
    "Tasks put off untried, since their domain is slow and held more than its share of the queue",
)
SENDER_CLAIMS = Gauge("postroad_sender_claims", "Claims in hand")
SENDER_LEASES_LOST = Counter("postroad_sender_leases_lost_total", "Claims found to be another's on renewal")
SENDER_SECONDS = Histogram(
    "postroad_sender_smtp_seconds",
    "Time of an SMTP attempt, its wait for a session included",
    buckets=_LATENCY,
)
SENDER_SESSIONS = Gauge("postroad_sender_sessions", "SMTP sessions, by state: busy or idle", ["state"])


class WorstDomains(Collector):
    """Figures of the recipients' domains that hold most of a sender, ten at a time: series stay few."""

    MOST = 10
    _FIGURES = (
        (
            "postroad_sender_domain_sessions",
            "SMTP sessions that the domain's mails have; the ten worst domains",
        ),
        ("postroad_sender_domain_claims", "Claims in hand of the domain; the ten worst domains"),
        (
            "postroad_sender_domain_waiting",
            "Records that wait for a claim of the domain; the ten worst domains",
        ),
        (
            "postroad_sender_domain_still_seconds",
            "Time since a session of the domain was taken or given back; the ten worst domains",
        ),
    )

    def __init__(self) -> None:
        self._source: Callable[[], Iterable[tuple[str, float, float, float, float]]] = tuple
        REGISTRY.register(self)

    def set_function(self, source: Callable[[], Iterable[tuple[str, float, float, float, float]]]) -> None:
        """Have `source`, called on any thread, give each domain and its figures in order, worst first."""
        self._source = source

    def describe(self) -> Sequence[GaugeMetricFamily]:
        """Return the metrics without figures."""
        return [GaugeMetricFamily(name, text, labels=["domain"]) for name, text in self._FIGURES]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the metrics."""
        metrics = self.describe()
        for domain, *figures in list(self._source())[: self.MOST]:
            for metric, figure in zip(metrics, figures, strict=True):
                metric.add_metric([domain], figure)
        yield from metrics


SENDER_DOMAINS = WorstDomains()
SENDER_RELAY_UP = Gauge("postroad_sender_relay_up", "0 while the relay cannot be used", ["relay"])
SENDER_RELAY_TROUBLE = Gauge(
    "postroad_sender_relay_trouble",
    "1 while the relay cannot be used, with how far a session came and what was said last",
    ["relay", "phase", "reply"],
)

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logs(service: str, replica: str, form: Literal["json", "console"], level: str) -> None:
    """Send this process's logs, structlog's and the standard library's alike, to stderr.

    `form` is json (one object a line) or console; `level` the least level written.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )

    def name_the_speaker(
        _logger: object, _method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        event["service"], event["replica"] = service, replica
        return event

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[name_the_speaker, structlog.stdlib.ProcessorFormatter.remove_processors_meta, last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_LEVELS[level])
