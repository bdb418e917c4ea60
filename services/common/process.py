"""The process of a service: its settings, logs, event loop, signals, health and exit code."""

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

from services.common.config import Settings, refusals, settings
from services.common.environment import misspelt
from services.common.health import HealthServer, Heartbeat
from services.common.logs import configure_logs

__all__ = ["Service", "main"]

log = structlog.get_logger(__name__)


class Service(Protocol):
    """A service as its process sees it."""

    async def run(self) -> None:
        """Serve until the drain that `stop` begins has ended. If it raises, the process exits with 1."""

    def stop(self) -> None:
        """Begin to drain. Called once, on the loop's thread; must not block."""

    def problems(self) -> list[str]:
        """Return why the service is not ready, and as `health.Degraded` what is wrong although it is ready.

        Called on another thread; must not block.
        """


class _BadSetting(Exception):
    """A setting of the right type that the service cannot use."""


def main(name: str, build: Callable[[Settings], Awaitable[Service]]) -> NoReturn:
    """Run the service that `build` returns, and exit with a code.

    - 0: after a drain (SIGTERM or SIGINT).
    - 1: the service failed, or a second signal came.
    - 2: a setting is wrong (`build` raises ValueError for it), or a variable is unknown.
    """
    if lines := misspelt(os.environ):
        print("\n".join(lines), file=sys.stderr)
        sys.exit(2)
    try:
        config = settings()
    except ValidationError as error:
        print("\n".join(refusals(error)), file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        print(error, file=sys.stderr)
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
        HealthServer(
            config.http_listen, config.operator_token.get_secret_value(), heartbeat, service.problems
        ) as health,
    ):
        # The objects of now stay. Collecting the youngest generation every 700 allocations cost 60 us a task.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        log.info("started", http=health.address)
        await service.run()
    log.info("stopped")
