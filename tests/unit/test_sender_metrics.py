"""The sender's gauges that are computed when Prometheus asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY

from services.sender.metrics import SENDER_DOMAINS


@pytest.fixture(autouse=True)
def _no_source() -> Iterator[None]:
    yield
    SENDER_DOMAINS.set_function(tuple)


def test_a_sender_s_ten_worst_domains_have_figures_and_no_others() -> None:
    def figure(name: str, domain: str) -> float | None:
        return REGISTRY.get_sample_value(f"postroad_sender_domain_{name}", {"domain": domain})

    assert figure("sessions", "d0.test") is None
    SENDER_DOMAINS.set_function(lambda: [(f"d{n}.test", 12 - n, 20, 3, 61.5) for n in range(12)])
    names = ("sessions", "claims", "waiting", "still_seconds")
    assert [figure(name, "d0.test") for name in names] == [12, 20, 3, 61.5]
    assert figure("sessions", "d9.test") == 3
    assert figure("sessions", "d10.test") is None
    # A domain without claims leaves no series behind.
    SENDER_DOMAINS.set_function(lambda: [("d1.test", 1, 1, 0, 0.0)])
    assert figure("sessions", "d0.test") is None
