"""The scenario `idle`: the CPU of everything while nothing is asked of it."""

from __future__ import annotations

import argparse
import time
from typing import Any

from deploy.local.state import SERVICES
from tests.bench import options, throughput
from tests.bench.receivers import quick_sink
from tests.bench.servers import Installation, running_servers
from tests.bench.usage import spent

__all__ = ["run"]

# After the warm-up, paces fall and sessions are closed.
_QUIET_SECONDS = 20.0


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Run the scenario. Raises RuntimeError where the services use more of a core than `given.percent`."""
    with (
        running_servers(given.database) as servers,
        quick_sink() as sink,
        Installation(servers, sink, **options.settings(given)) as installation,
    ):
        # Connections, caches and the JVM's compiler are those of an installation that has worked.
        throughput.measured(installation, {})
        time.sleep(_QUIET_SECONDS)
        before = installation.usage()
        time.sleep(given.seconds)
        used = spent(before, installation.usage())
    percent = {name: seconds / given.seconds * 100 for name, seconds in used.items()}
    services = sum(share for name, share in percent.items() if name in SERVICES)
    print("  percent of a core: " + "  ".join(f"{name} {share:.2f}" for name, share in percent.items()))
    print(f"  all services {services:.2f}", flush=True)
    if services >= given.percent:
        raise RuntimeError(f"the idle services use {services:.2f} % of a core, not below {given.percent:g} %")
    return {"percent_of_a_core": percent, "services": services}
