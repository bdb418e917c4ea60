"""The metrics of the sender, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from services.common.stage.metrics import LATENCY_BUCKETS

__all__ = [
    "SENDER_CLAIMS",
    "SENDER_DOMAINS",
    "SENDER_FENCED",
    "SENDER_IN_DOUBT",
    "SENDER_LEASES_LOST",
    "SENDER_OUTCOMES",
    "SENDER_RELAY_TROUBLE",
    "SENDER_RELAY_UP",
    "SENDER_SECONDS",
    "SENDER_SESSIONS",
    "SENDER_SHED",
    "SENDER_SKIPPED",
    "WorstDomains",
]

SENDER_OUTCOMES = Counter(
    "postroad_sender_outcomes_total",
    "Attempts settled, by how: sent, deferred, failed or uncertain",
    ["outcome"],
)
SENDER_IN_DOUBT = Counter(
    "postroad_sender_in_doubt_total",
    "Mails that may have gone out, by how: takeover of a dead sender's claim, or lost reply",
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
SENDER_SHED = Counter(
    # The name is older than the glossary; dashboards have it.
    "postroad_sender_crowded_total",
    "Tasks deferred untried, since their domain is slow and held more than its share of the queue",
)
SENDER_CLAIMS = Gauge("postroad_sender_claims", "Claims that the sender holds")
SENDER_LEASES_LOST = Counter("postroad_sender_leases_lost_total", "Claims found to be another's on renewal")
SENDER_SECONDS = Histogram(
    "postroad_sender_smtp_seconds",
    "Time of an SMTP attempt, its wait for a session included",
    buckets=LATENCY_BUCKETS,
)
SENDER_SESSIONS = Gauge("postroad_sender_sessions", "SMTP sessions, by state: busy or idle", ["state"])


class WorstDomains(Collector):
    """Gauges of the ten domains that use most of a sender; the others have none, so that series stay few."""

    MOST = 10
    _FIGURES = (
        (
            "postroad_sender_domain_sessions",
            "SMTP sessions that the domain's mails have; the ten worst domains",
        ),
        (
            "postroad_sender_domain_claims",
            "Claims that the sender holds of the domain; the ten worst domains",
        ),
        (
            "postroad_sender_domain_waiting",
            "Records that wait for a claim of the domain; the ten worst domains",
        ),
        (
            "postroad_sender_domain_still_seconds",
            "Time since the domain last acquired or released a session; the ten worst domains",
        ),
    )

    def __init__(self) -> None:
        self._source: Callable[[], Iterable[tuple[str, float, float, float, float]]] = tuple
        REGISTRY.register(self)

    def set_function(self, source: Callable[[], Iterable[tuple[str, float, float, float, float]]]) -> None:
        """Set the source: it returns each domain with its figures, worst first. Any thread may call it."""
        self._source = source

    def describe(self) -> Sequence[GaugeMetricFamily]:
        """Return the gauges without values."""
        return [GaugeMetricFamily(name, text, labels=["domain"]) for name, text in self._FIGURES]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges with their values."""
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
