"""The DNS lookup that finds out whether a domain takes mail: which questions it asks, and when.

`mx` decides what the answers mean, and `servers` which server is asked. This file turns dnspython's results
into plain values.
"""

import asyncio
import ipaddress
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TypeVar, cast

import dns.asyncresolver
import dns.exception
import dns.name
import dns.nameserver
import dns.rdata
import dns.rdatatype
import dns.resolver
from dns.rdtypes.ANY.MX import MX
from dns.rdtypes.IN.A import A
from dns.rdtypes.IN.AAAA import AAAA

from services.validator.metrics import VALIDATOR_LOOKUP_SECONDS
from services.validator.mx import (
    Address,
    Answer,
    AnswerKind,
    HostLookup,
    HostState,
    Mx,
    Verdict,
    final_verdict,
    first_verdict,
    host_state,
    is_usable,
)
from services.validator.servers import NameServers, Unanswered, negative_ttl

__all__ = ["Lookup"]

T = TypeVar("T")

# A name may be an alias of an alias; a longer chain than this is a loop.
_MAX_ALIASES = 8
# One usable host settles the verdict. The other hosts have this long (seconds) to be listed too.
_OTHER_HOSTS_TIMEOUT = 1.0
# Many domains share few mail hosts, so lookups remember usable hosts: so many, and for so long (seconds).
_MAX_KNOWN_HOSTS = 10_000
_LONGEST_KNOWN = 3600


class Lookup:
    """Looks up the verdicts on domains.

    A lookup takes at most `lifetime` seconds. At most `domains` are looked up at a time; the lifetime of
    others begins later. Of each domain at most `hosts` mail hosts are looked up at a time. So there are
    never more sockets than the product of both.
    """

    def __init__(
        self,
        resolver: dns.asyncresolver.Resolver,
        *,
        lifetime: float = 5.0,
        domains: int = 200,
        hosts: int = 4,
    ) -> None:
        self._servers = NameServers(resolver, lifetime)
        self._lifetime = lifetime
        self._domains = asyncio.Semaphore(domains)
        self._hosts = hosts
        self._usable: dict[str, float] = {}

    async def __call__(self, domain: str, fresh: bool = False) -> Verdict:
        """Return the verdict on `domain`, which must be in A-label form (`names.to_ascii`).

        A `fresh` lookup ignores the remembered hosts. Failures of DNS or of the network raise nothing: they
        make a transient verdict.
        """
        async with self._domains:
            with VALIDATOR_LOOKUP_SECONDS.time():
                return await self._look_up_domain(domain, fresh)

    async def _look_up_domain(self, domain: str, fresh: bool) -> Verdict:
        deadline = monotonic() + self._lifetime
        answer = await self._ask(domain, dns.rdatatype.MX, deadline, _mx)
        first = first_verdict(domain, answer)
        if isinstance(first, Verdict):
            return first
        known = {} if fresh else self._recall([name for _, name in first])
        hosts = await self._look_up_hosts([name for _, name in first], known, deadline)
        return final_verdict(domain, answer, hosts)

    async def _look_up_hosts(
        self, names: Sequence[str], known: dict[str, HostLookup], deadline: float
    ) -> dict[str, HostLookup]:
        """Return the known hosts and those that could be looked up in time."""
        gate = asyncio.Semaphore(self._hosts)
        tasks = {
            asyncio.create_task(self._look_up_host(name, gate, deadline)): name
            for name in names
            if name not in known
        }
        pending = set(tasks)
        try:
            while pending:
                if any(host.state is HostState.USABLE for host in known.values()):
                    deadline = min(deadline, monotonic() + _OTHER_HOSTS_TIMEOUT)
                done, pending = await asyncio.wait(
                    pending, timeout=max(0.0, deadline - monotonic()), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                known |= {tasks[task]: task.result() for task in done}
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return known

    async def _look_up_host(self, name: str, gate: asyncio.Semaphore, deadline: float) -> HostLookup:
        async with gate:
            answers: tuple[Answer[Address], ...] = (
                await self._ask(name, dns.rdatatype.A, deadline, _address),
            )
            if answers[0].kind is not AnswerKind.NO_NAME and not any(map(is_usable, answers[0].records)):
                answers += (await self._ask(name, dns.rdatatype.AAAA, deadline, _address),)
        host = host_state(answers)
        if host.state is HostState.USABLE:
            self._remember(name, host)
        elif host.state is not HostState.UNKNOWN:
            self._usable.pop(name, None)
        return host

    def _recall(self, names: Sequence[str]) -> dict[str, HostLookup]:
        now = monotonic()
        left = {name: int(self._usable.get(name, 0.0) - now) for name in names}
        return {name: HostLookup(HostState.USABLE, seconds) for name, seconds in left.items() if seconds >= 1}

    def _remember(self, name: str, host: HostLookup) -> None:
        if len(self._usable) >= _MAX_KNOWN_HOSTS:
            self._usable.clear()
        self._usable[name] = monotonic() + min(host.ttl or 0, _LONGEST_KNOWN)

    async def _ask(
        self, name: str, kind: dns.rdatatype.RdataType, deadline: float, read: Callable[[dns.rdata.Rdata], T]
    ) -> Answer[T]:
        """Ask one question; `read` turns each record into a plain value."""
        try:
            question = dns.name.from_text(name)
            for _ in range(_MAX_ALIASES):
                found = await self._servers.ask(question, kind, deadline)
                if found.rrset is not None:
                    ttl = found.chaining_result.minimum_ttl
                    return Answer(AnswerKind.RECORDS, tuple(read(record) for record in found.rrset), ttl)
                if found.canonical_name == question:
                    return Answer(AnswerKind.NO_DATA, (), negative_ttl(found.response))
                # A server that knows only its own zones does not follow an alias into another zone.
                question = found.canonical_name
        except dns.resolver.NXDOMAIN as error:
            (response,) = error.kwargs["responses"].values()
            return Answer(AnswerKind.NO_NAME, (), negative_ttl(response))
        except (Unanswered, dns.exception.DNSException) as error:
            return Answer(AnswerKind.NOTHING, detail=str(error) or type(error).__name__)
        return Answer(AnswerKind.NOTHING, detail="too many aliases")


def _mx(record: dns.rdata.Rdata) -> Mx:
    mx = cast(MX, record)
    return mx.preference, mx.exchange.to_text(omit_final_dot=True).lower().removesuffix(".")


def _address(record: dns.rdata.Rdata) -> Address:
    return ipaddress.ip_address(cast(A | AAAA, record).address)
