"""The scenario `backlog`: many tasks wait for a receiver that is slow, which then becomes quick.

It quotes the most memory that each service had, and fails where that is too much. It also quotes how quickly
the waiting tasks leave.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from deploy.local.state import SERVICES
from tests.bench import load, options, throughput
from tests.bench.counts import wait_until_ended, wait_until_settled
from tests.bench.receivers import slow_sink
from tests.bench.servers import Installation, running_servers

__all__ = ["run"]

_SLOW_MS = 10_000
_STAYS = 10.0
_DRAIN_SECONDS = 1800.0


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Run the scenario. Raises RuntimeError where a service had more memory than `given.megabytes`."""
    with (
        running_servers(given.database) as servers,
        slow_sink(_SLOW_MS) as sink,
        Installation(servers, sink, **options.settings(given)) as installation,
    ):
        installation.up()
        start = time.monotonic()
        sent = load.run(throughput.batch(given.tasks)(installation.targets))
        if sent.errors:
            raise RuntimeError(f"{len(sent.errors)} calls failed: {sent.errors[0]}")
        installation.created += len(sent.called_at)
        created = time.monotonic() - start
        time.sleep(_STAYS)
        waiting = installation.created - installation.mails()
        print(f"  {waiting} tasks wait, created in {created:.0f} s", flush=True)
        resident = _most(installation)
        sink.take(0)
        start = time.monotonic()
        wait_until_ended(installation, _DRAIN_SECONDS)
        drained = time.monotonic() - start
        wait_until_settled(installation, 120)
        most = _most(installation)
    rate = waiting / drained
    print(
        f"  they left in {drained:.0f} s, {rate:.0f} a second; most resident MB while they waited / in all:"
    )
    print("  " + "  ".join(f"{name} {resident[name]:.0f}/{mb:.0f}" for name, mb in most.items()), flush=True)
    if too_much := {name: mb for name, mb in most.items() if mb > given.megabytes}:
        raise RuntimeError(f"more than {given.megabytes} MB: {too_much}")
    return {"waiting": waiting, "drain_rate": rate, "waiting_mb": resident, "most_mb": most}


def _most(installation: Installation) -> dict[str, float]:
    """Return the most resident memory that each service had so far, in megabytes."""
    used = installation.usage().items()
    return {name: one.most_resident_mb for name, one in used if name.rpartition("-")[0] in SERVICES}
