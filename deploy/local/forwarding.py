"""Forwards the questions for other names than `.test` to the machine's resolver."""

import asyncio
from collections.abc import Sequence

import dns.asyncquery
import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.resolver

__all__ = ["Forwarder", "system_resolvers"]

OWN = dns.name.from_text("test.")
"""The names that this server answers for itself."""
# Clients wait some 5 s, which must leave time for a second resolver.
SECONDS = 2.0
LARGEST = 65_535


def system_resolvers() -> list[tuple[str, int]]:
    """Return the (address, port) pairs of /etc/resolv.conf; empty when it names none."""
    try:
        return [(str(server), 53) for server in dns.resolver.Resolver().nameservers]
    except dns.resolver.NoResolverConfiguration:
        return []


class Forwarder:
    """Asks `resolvers`, (address, port) pairs, one after the other. Each has `seconds` to answer."""

    def __init__(self, resolvers: Sequence[tuple[str, int]], seconds: float = SECONDS) -> None:
        self._resolvers, self._seconds = resolvers, seconds

    def takes(self, question: bytes) -> bool:
        """Return whether this message asks for a name outside `test.`."""
        try:
            query = dns.message.from_wire(question, question_only=True, ignore_trailing=True)
        except dns.exception.DNSException:
            return False
        return len(query.question) == 1 and not query.question[0].name.is_subdomain(OWN)

    async def answer(self, question: bytes, *, tcp: bool) -> bytes:
        """Return the first answer of a resolver, or SERVFAIL when none answers in time."""
        query = dns.message.from_wire(question, ignore_trailing=True)
        ask = dns.asyncquery.tcp if tcp else dns.asyncquery.udp
        for address, port in self._resolvers:
            try:
                reply = await ask(query, address, self._seconds, port)
                return reply.to_wire(max_size=LARGEST)
            except (dns.exception.DNSException, OSError, EOFError, asyncio.IncompleteReadError):
                continue
        refusal = dns.message.make_response(query, recursion_available=True)
        refusal.set_rcode(dns.rcode.SERVFAIL)
        return refusal.to_wire()
