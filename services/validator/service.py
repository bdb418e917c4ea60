"""The validator service: its stage, with the DNS servers of the settings."""

import time

from services.common.config import Settings, refused
from services.common.stage.service import StageService
from services.validator.cache import VerdictCache
from services.validator.dns_lookup import Lookup
from services.validator.resolver import make_resolver
from services.validator.stage import stage

__all__ = ["ValidatorService", "build"]


class ValidatorService(StageService):
    """The validator's stage, and the cache of verdicts that it asks."""

    def __init__(self, settings: Settings, lookup: Lookup) -> None:
        delays = settings.validator_delays
        # Slightly less than the shortest delay: a retry at its due time must ask DNS anew.
        transient_ttl = 0.9 * min(delays, default=30)
        self._cache = VerdictCache(lookup, time.monotonic, transient_ttl=transient_ttl)
        super().__init__(stage(self._cache, delays), settings)

    async def close(self) -> None:
        """Cancel the lookups that still run."""
        await self._cache.close()


async def build(settings: Settings) -> ValidatorService:
    """Return the service. Blocks while the system resolves names in `dns_servers`.

    Raises ValueError if those cannot be used.
    """
    with refused("dns_servers"):
        resolver = make_resolver(settings.dns_servers)
    return ValidatorService(settings, Lookup(resolver, lifetime=settings.dns_timeout))
