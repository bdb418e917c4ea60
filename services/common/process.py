"""What every service's process does alike: settings, logs, loop, signals, health, exit code."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn, Protocol

import structlog
import uvloop
from pydantic import ValidationError

from services.common.config import Settings, misspelt, refusals, settings
from services.common.health import HealthServer, Heartbeat
from services.common.logs import configure_logs

__all__ = ["Service", "main"]

log = structlog.get_logger(__name__)


class Service(Protocol):
    """A service as its process sees it."""

    async def run(self) -> None:
        """Serve until `stop` was called and all in flight is settled; raising ends the process with 1."""

    def stop(self) -> None:
        """Begin to drain. Called on the loop's thread, once; may not block."""

    def problems(self) -> list[str]:
        """Return why the service is not ready, and as `health.Degraded` what is wrong though it is.

        Called on another thread; may not block.
        """


class _BadSetting(Exception):
    """A setting that is of the right type and yet cannot be used."""


def main(name: str, build: Callable[[Settings], Awaitable[Service]]) -> NoReturn:
    """Run the service that `build` makes, and exit.

    0 after a drain (SIGTERM or SIGINT), 1 when the service failed or a second signal came, 2 when a
    setting is wrong (`build` raises ValueError where it cannot be used) or a variable is none of ours.
    """
    if lines := misspelt(os.environ):
        print("\n".join(lines), file=sys.stderr)
        sys.exit(2)
    try:
        config = settings()
    except ValidationError as error:
        print("\n".join(refusals(error)), file=sys.stderr)
        sys.exit(2)
    configure_logs(name, config.replica_name, config.log_format, config.log_level)
    try:
        uvloop.run(_serve(name, build, config))
    except _BadSetting as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except Exception:
        log.exception("service failed")
        sys.exit(1)
    sys.exit(0)


async def _serve(name: str, build: Callable[[Settings], Awaitable[Service]], config: Settings) -> None:
    loop = asyncio.get_running_loop()
    try:
        service = await build(config)
    except ValueError as error:
        raise _BadSetting(error) from error
    stopping = False

    def on_signal() -> None:
        nonlocal stopping
        if stopping:
            log.warning("second signal: ending at once")
            os._exit(1)
        stopping = True
        log.info("draining")
        service.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    with (
        Heartbeat(loop) as heartbeat,
        HealthServer(config.http_listen, heartbeat, service.problems) as health,
    ):
        # What stands now stays; a collection of the youngest at every 700 allocations cost 60 us a task.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        log.info("started", http=health.address)
        await service.run()
    log.info("stopped")
