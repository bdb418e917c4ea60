"""The short form of a test, which `make test` runs, and the long one, which `make test-long` runs."""

from __future__ import annotations

import os
from typing import TypeVar

from hypothesis import HealthCheck, settings

__all__ = ["LONG", "by_form"]

LONG = os.environ.get("POSTROAD_TEST_LONG") == "1"
T = TypeVar("T")


def by_form(short: T, long: T) -> T:
    """Return `long` in a run of the long forms, else `short`."""
    return long if LONG else short


# How long an example takes depends more on the machine's other load than on the code. The short form has the
# same examples each time; the long one looks for new ones.
settings.register_profile(
    "short", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50, derandomize=True
)
settings.register_profile("long", settings.get_profile("short"), max_examples=1000, derandomize=False)
settings.load_profile(by_form("short", "long"))
