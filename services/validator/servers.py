"""One question to several name servers in turn, until one answers it."""

from __future__ import annotations

import copy
from time import monotonic

import dns.asyncbackend
import dns.asyncresolver
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import dns.resolver

__all__ = ["REMEMBERED", "NameServers", "Unanswered", "negative_ttl"]

REMEMBERED = 30.0
"""Seconds for which a server that did not answer is asked after the others."""


class Unanswered(Exception):
    """No server answered the question; the text says in a few words what they did."""


class _NameServer:
    """A resolver that asks this server alone. `silent_until` (monotonic) is 0 while it answers."""

    def __init__(self, resolver: dns.asyncresolver.Resolver, nameserver: object) -> None:
        self.resolver = copy.copy(resolver)
        self.resolver.nameservers = [nameserver]  # type: ignore[list-item]
        self.silent_until = 0.0


class NameServers:
    """The name servers of `resolver`, in its order. One event loop's own.

    `lifetime` is the seconds that all questions about a domain may take. A question waits for one of several
    servers no longer than its share of them, and for any no longer than `resolver.timeout`. Those that were
    silent are asked again while there is time.
    """

    def __init__(self, resolver: dns.asyncresolver.Resolver, lifetime: float) -> None:
        self._servers = [_NameServer(resolver, nameserver) for nameserver in resolver.nameservers]
        # One share is left for the questions that follow, after a first one that found all but one silent.
        shares = len(self._servers) + 1 if len(self._servers) > 1 else 1
        self._share = min(resolver.timeout, lifetime / shares)
        self._backend = dns.asyncbackend.get_backend("asyncio")

    async def ask(
        self, question: dns.name.Name, kind: dns.rdatatype.RdataType, deadline: float
    ) -> dns.resolver.Answer:
        """Return the first answer; its `rrset` is None where the name exists and has no such record.

        `deadline` is monotonic. Raises `dns.resolver.NXDOMAIN`, and Unanswered.
        """
        troubles: set[str] = set()
        waiting = self._in_turn()
        while waiting:
            silent = []
            for server in waiting:
                left = deadline - monotonic()
                if left <= 0:
                    raise Unanswered(_said(troubles))
                try:
                    found = await server.resolver.resolve(
                        question,
                        kind,
                        raise_on_no_answer=False,
                        lifetime=min(self._share, left),
                        backend=self._backend,
                    )
                except dns.resolver.NXDOMAIN as error:
                    server.silent_until = 0.0
                    (response,) = error.kwargs["responses"].values()
                    if not _lame(response):
                        raise
                    troubles.add("NXDOMAIN from a server that does not have the zone")
                except dns.exception.Timeout:
                    server.silent_until = monotonic() + REMEMBERED
                    silent.append(server)
                    troubles.add("no answer in time")
                except (dns.exception.DNSException, OSError) as error:
                    server.silent_until = 0.0
                    troubles |= _troubles(error)
                else:
                    server.silent_until = 0.0
                    if not _lame(found.response):
                        return found
                    troubles.add("a referral, not an answer")
            waiting = silent
        raise Unanswered(_said(troubles))

    def _in_turn(self) -> list[_NameServer]:
        """Return the servers, those that were silent of late last."""
        now = monotonic()
        turn = sorted(self._servers, key=lambda server: server.silent_until * (server.silent_until > now))
        for server in turn:
            if 0 < server.silent_until <= now:
                # This question finds out whether it is back; others that come meanwhile do not wait for it.
                server.silent_until = now + self._share
        return turn


def negative_ttl(response: dns.message.QueryMessage) -> int | None:
    """Return for how many seconds a negative answer holds (RFC 2308); None where it has no SOA to say so."""
    chain = response.resolve_chaining()
    zones = [rrset.name for rrset in response.authority if rrset.rdtype == dns.rdatatype.SOA]
    return int(chain.minimum_ttl) if any(map(chain.canonical_name.is_subdomain, zones)) else None


def _lame(response: dns.message.QueryMessage) -> bool:
    """Whether an empty answer or NXDOMAIN is of a server that neither has the zone nor asks others for it.

    RFC 2308, section 2.2, tells it by the NS records; a server that is lame may leave them out.
    """
    flags = response.flags & (dns.flags.AA | dns.flags.RA)
    return not (response.answer or flags) and negative_ttl(response) is None


def _said(troubles: set[str]) -> str:
    return ", ".join(sorted(troubles)) or "no answer in time"


def _troubles(error: Exception) -> set[str]:
    """The trouble in a few words: dnspython's own text repeats question, server and port of every try."""
    if isinstance(error, dns.resolver.NoNameservers):
        return {str(trial[3]) or type(trial[3]).__name__ for trial in error.kwargs["errors"]}
    return {str(error) or type(error).__name__}
