"""A sender that claims nothing: it sends a redelivered record's mail again."""

from __future__ import annotations

import runpy
import time
from collections.abc import Sequence
from datetime import datetime

from services.common.deliveries.decide import (
    Cancel,
    Claim,
    ClaimAnswer,
    Delivery,
    Settled,
    Taken,
    initial_row,
)
from services.common.deliveries.settlement import Settlement
from services.sender.claims import Claims

__all__: list[str] = []


def _claim(_: Claims, requests: Sequence[Claim | Cancel], take_over: bool = True) -> list[ClaimAnswer]:
    rows = [initial_row(request, datetime.max) for request in requests]
    since = time.monotonic()
    return [Taken(row, since=since) if row.state == "sending" else Settled(row) for row in rows]


def _settle(_: Claims, settled: Sequence[Delivery]) -> list[Settlement]:
    return [Settlement.STORED] * len(settled)


def _renew(_: Claims, rows: Sequence[Delivery]) -> list[bool]:
    return [True] * len(rows)


if __name__ == "__main__":
    Claims.claim, Claims.store, Claims.renew = _claim, _settle, _renew  # type: ignore[method-assign]
    runpy.run_module("services.sender", run_name="__main__")
