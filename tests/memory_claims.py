"""Claims without a database: the rules of decide.py over a dictionary, with a clock that the test sets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta

from services.common.deliveries.decide import Cancel, Claim, ClaimAnswer, Delivery, Taken, decide
from services.common.deliveries.settlement import Settlement, settlement

__all__ = ["MemoryClaims"]


class MemoryClaims:
    """What `services.sender.claims.Claims` answers. `errors` are raised first, one a call.

    Calls wait while `gate` is not set; `calls` counts them, those that wait included.
    """

    def __init__(self, lease_seconds: float, hold: bool, max_resends: int = 1) -> None:
        self.rows: dict[bytes, Delivery] = {}
        self.now = datetime(2026, 3, 1)
        self.errors: list[Exception] = []
        self.calls = 0
        self.gate = threading.Event()
        self.gate.set()
        self._lease = timedelta(seconds=lease_seconds)
        self.hold, self.max_resends = hold, max_resends
        self._lock = threading.Lock()

    def expire(self) -> None:
        """End all leases."""
        self.now += 2 * self._lease

    def recover(self) -> None:
        """Raise no more errors."""
        with self._lock:
            self.errors.clear()

    def claim(self, requests: Sequence[Claim | Cancel], take_over: bool = True) -> list[ClaimAnswer]:
        since = time.monotonic()
        verdicts: list[ClaimAnswer] = []
        with self._begun():
            for request in requests:
                found = self.rows.get(request.task_id)
                verdict, row = decide(
                    found, request, self.now, self._lease, self.hold, self.max_resends, take_over
                )
                verdicts.append(verdict._replace(since=since) if isinstance(verdict, Taken) else verdict)
                if row is not None:
                    self.rows[row.task_id] = row
        return verdicts

    def store(self, new_rows: Sequence[Delivery]) -> list[Settlement]:
        results = []
        with self._begun():
            for wish in new_rows:
                became, row = settlement(self.rows.get(wish.task_id), wish)
                results.append(became)
                if row is not None:
                    self.rows[row.task_id] = row
        return results

    def renew(self, rows: Sequence[Delivery]) -> list[bool]:
        held = []
        with self._begun():
            for row in rows:
                found = self.rows.get(row.task_id)
                ours = found is not None and found.owner == row.owner and found.state == "sending"
                held.append(ours)
                if found is not None and ours:
                    self.rows[row.task_id] = found._replace(lease_until=self.now + self._lease)
        return held

    @contextmanager
    def _begun(self) -> Iterator[None]:
        self.calls += 1
        self.gate.wait()
        with self._lock:
            if self.errors:
                raise self.errors.pop(0)
            yield
