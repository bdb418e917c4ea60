"""Asks several name servers in turn, until one answers."""

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
"""A server that did not answer comes after the others for this long (seconds)."""


class Unanswered(Exception):
    """No server answered the question; the text says briefly what they did."""


class _ServerState:
    """A resolver that asks one server only. `silent_until` (monotonic) is 0 while the server answers."""

    def __init__(self, resolver: dns.asyncresolver.Resolver, nameserver: object) -> None:
        self.resolver = copy.copy(resolver)
        self.resolver.nameservers = [nameserver]  # type: ignore[list-item]
        self.silent_until = 0.0


class NameServers:
    """The name servers of `resolver`, in its order. Belongs to one event loop.

    All questions about a domain may take `lifetime` seconds. Several servers have equal shares of it: a
    question waits no longer for one of them, and never longer than `resolver.timeout`. A question asks
    silent servers again while it has time.
    """

    def __init__(self, resolver: dns.asyncresolver.Resolver, lifetime: float) -> None:
        self._servers = [_ServerState(resolver, nameserver) for nameserver in resolver.nameservers]
        # If the first question finds all but one silent, one share is left for the following questions.
        shares = len(self._servers) + 1 if len(self._servers) > 1 else 1
        self._share = min(resolver.timeout, lifetime / shares)
        self._backend = dns.asyncbackend.get_backend("asyncio")

    async def ask(
        self, question: dns.name.Name, kind: dns.rdatatype.RdataType, deadline: float
    ) -> dns.resolver.Answer:
        """Return the first answer; its `rrset` is None if the name exists and has no such record.

        `deadline` is monotonic. Raises `dns.resolver.NXDOMAIN` and Unanswered.
        """
        troubles: set[str] = set()
        waiting = self._in_turn()
        while waiting:
            silent = []
            for server in waiting:
                left = deadline - monotonic()
                if left <= 0:
                    raise Unanswered(_summary(troubles))
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
        raise Unanswered(_summary(troubles))

    def _in_turn(self) -> list[_ServerState]:
        """Return the servers in the order in which to ask them: silent ones come last."""
        now = monotonic()
        turn = sorted(self._servers, key=lambda server: server.silent_until * (server.silent_until > now))
        for server in turn:
            if 0 < server.silent_until <= now:
                # This question finds out whether the server answers again; others meanwhile do not wait for
                # it.
                server.silent_until = now + self._share
        return turn


def negative_ttl(response: dns.message.QueryMessage) -> int | None:
    """Return the seconds for which a negative answer is valid (RFC 2308); None if it has no SOA."""
    chain = response.resolve_chaining()
    zones = [rrset.name for rrset in response.authority if rrset.rdtype == dns.rdatatype.SOA]
    return int(chain.minimum_ttl) if any(map(chain.canonical_name.is_subdomain, zones)) else None


def _lame(response: dns.message.QueryMessage) -> bool:
    """Return whether an empty answer or NXDOMAIN comes from a server without the zone that asks no other
    server.

    RFC 2308, section 2.2, recognises it by the NS records; a lame server may leave them out.
    """
    flags = response.flags & (dns.flags.AA | dns.flags.RA)
    return not (response.answer or flags) and negative_ttl(response) is None


def _summary(troubles: set[str]) -> str:
    return ", ".join(sorted(troubles)) or "no answer in time"


def _troubles(error: Exception) -> set[str]:
    """Return the errors briefly: dnspython's own text repeats question, server and port of every try."""
    if isinstance(error, dns.resolver.NoNameservers):
        return {str(trial[3]) or type(trial[3]).__name__ for trial in error.kwargs["errors"]}
    return {str(error) or type(error).__name__}
