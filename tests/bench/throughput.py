"""The scenarios `pipeline`, `unary`, `batch` and `steady`: loads on a fresh installation, round after round.

With `--other CLONE` another clone's services take turns with this clone's, on the same servers. The ratio of
their medians says what a change gave, however fast the machine is at the moment.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from deploy.local.layout import ROOT
from tests.bench import diagnosis, options, report, storage
from tests.bench.counts import wait_until_ended, wait_until_settled
from tests.bench.diagnosis import Diagnosis
from tests.bench.load import Sent, at_rate, by_batches, by_callers
from tests.bench.load import run as run_load
from tests.bench.measure import Figures, figures
from tests.bench.receivers import CatcherReceiver, Receiver, quick_sink
from tests.bench.servers import Installation, Servers, read_env, running_servers

__all__ = ["Load", "batch", "loads_of", "measured", "receivers", "steady", "unary", "warm_up"]

Load = Callable[[list[str]], Coroutine[Any, Any, Sent]]
"""Creates tasks at these addresses."""

_BATCH_CALLERS, _BATCH_SIZE = 4, 500
_WARM_UNARY, _WARM_BATCH = 1500, 3000
_WARM_SECONDS = 60.0


def unary(tasks: int, callers: int) -> Load:
    """Return a load of single Creates from so many callers."""
    return partial(by_callers, tasks=tasks, callers=callers)


def batch(tasks: int, callers: int = _BATCH_CALLERS, size: int = _BATCH_SIZE) -> Load:
    """Return a load of BatchCreates."""
    return partial(by_batches, tasks=tasks, callers=callers, size=size)


def steady(rate: float, seconds: float) -> Load:
    """Return a load of single Creates at a rate a second."""
    return partial(at_rate, rate=rate, seconds=seconds)


def loads_of(scenario: str, given: argparse.Namespace) -> dict[str, Load]:
    """Return the loads of a scenario by what the report calls them."""
    loads: dict[str, Load] = {}
    if scenario in {"pipeline", "unary"}:
        loads |= {f"unary {callers} callers": unary(given.tasks, callers) for callers in given.callers}
    if scenario in {"pipeline", "batch"}:
        loads[f"batch {given.size}"] = batch(given.tasks, size=given.size)
    if scenario in {"pipeline", "steady"}:
        loads |= {f"steady {rate:g} a second": steady(rate, given.seconds) for rate in given.rates}
    return loads


@contextmanager
def receivers(servers: Servers, chosen: str) -> Iterator[list[Receiver]]:
    """Run the chosen receivers (`sink`, `catcher` or `both`) within the block."""
    with ExitStack() as parts:
        found: list[Receiver] = []
        if chosen in {"sink", "both"}:
            found.append(parts.enter_context(quick_sink()))
        if chosen in {"catcher", "both"}:
            env = read_env(servers.directory)
            address = (env["EMAIL_HOST"], int(env["EMAIL_PORT"]))
            found.append(CatcherReceiver(address, servers.journal))
        yield found


def _create(installation: Installation, load: Load) -> None:
    sent = run_load(load(installation.targets))
    installation.created += len(sent.called_at)
    wait_until_ended(installation)


def warm_up(servers: Servers, receiver: Receiver, tasks: int) -> None:
    """Load the servers, so that the broker's compiler is done with the hot paths; the services end then.

    It stops after a minute, since a busy machine may need ten for all `tasks`.
    """
    if not tasks:
        return
    end = time.monotonic() + _WARM_SECONDS
    with Installation(servers, receiver) as installation:
        installation.up()
        while installation.created < tasks and time.monotonic() < end:
            _create(installation, unary(_WARM_UNARY, 64))
            _create(installation, batch(_WARM_BATCH))


def measured(
    installation: Installation, loads: dict[str, Load], look: Diagnosis | None = None, **replicas: int
) -> dict[str, Figures]:
    """Start an installation, warm it up, run each load, and return its figures. Raises WrongCountsError."""
    installation.up(**replicas)
    _create(installation, unary(_WARM_UNARY, 64))
    _create(installation, batch(_WARM_BATCH))
    wait_until_settled(installation)
    found = {}
    for name, load in loads.items():
        with (look or Diagnosis()).around(installation, name) as lines:
            one = run_load(figures(installation, partial(load, installation.targets)))
        found[name] = one
        print(report.line(name, one), *lines, sep="\n", flush=True)
    return found


def run(scenario: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run a scenario; return its rounds and its medians, as JSON has them."""
    sides = {"this": ROOT} | ({"other": Path(given.other).resolve()} if given.other else {})
    look = options.diagnosis(given)
    loads = loads_of(scenario, given)
    rounds: dict[str, list[Figures]] = {}
    stored: dict[str, float] = {}
    with (
        running_servers(given.database, **diagnosis.given(look)) as servers,
        receivers(servers, given.receiver) as taking,
    ):
        warm_up(servers, taking[0], given.warm_up)
        for number in range(given.rounds):
            for receiver in taking:
                # A slow trend of the machine does not favour one side.
                for side in _in_turn(list(sides), number):
                    print(f"round {number + 1}, {side}, mail to the {receiver.name}", flush=True)
                    with Installation(servers, receiver, sides[side], **options.settings(given)) as one:
                        for name, found in measured(one, loads, look, api=given.api).items():
                            rounds.setdefault(f"{name}, {receiver.name}, {side}", []).append(found)
                        stored = storage.bytes_a_task(one)
    print("bytes a task: " + "  ".join(f"{server} {number:.0f}" for server, number in stored.items()))
    print(report.medians(rounds))
    if given.other:
        print(report.ratios(rounds))
    return {**report.as_json(rounds), "bytes_a_task": stored}


def _in_turn(sides: Sequence[str], number: int) -> Sequence[str]:
    return sides if number % 2 == 0 else sides[::-1]
