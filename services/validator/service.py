"""The validator service: its stage, running on the DNS that the settings name."""

import time

from services.common.config import Settings, refused
from services.common.stage.runtime import StageRuntime
from services.validator.cache import VerdictCache
from services.validator.lookup import Lookup, make_resolver
from services.validator.stage import stage

__all__ = ["ValidatorService", "build"]


class ValidatorService:
    """What services/common/process.py runs."""

    def __init__(self, settings: Settings, lookup: Lookup) -> None:
        delays = settings.validator_delays
        # A little under the shortest delay: a retry that comes when it is due must ask the DNS anew.
        transient_ttl = 0.9 * min(delays, default=30)
        self._cache = VerdictCache(lookup, time.monotonic, transient_ttl=transient_ttl)
        self._runtime = StageRuntime(stage(self._cache, delays), settings, source="validator")

    async def run(self) -> None:
        """Validate until stopped and drained. Raises what ended the stage otherwise."""
        try:
            await self._runtime.run()
        finally:
            await self._cache.close()

    def stop(self) -> None:
        """Begin to drain. Does not block."""
        self._runtime.stop()

    def problems(self) -> list[str]:
        """Return why the service is not ready. Safe from any thread."""
        return self._runtime.problems()


async def build(settings: Settings) -> ValidatorService:
    """Return the service; it asks nothing before it runs, but may block on names in `dns_servers`.

    Raises ValueError when those cannot be used.
    """
    with refused("dns_servers"):
        resolver = make_resolver(settings.dns_servers)
    return ValidatorService(settings, Lookup(resolver, lifetime=settings.dns_timeout))
