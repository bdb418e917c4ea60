"""Several name servers, some of which misbehave, and negative answers of every kind, over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from services.validator import dns_lookup as lookups
from services.validator import servers
from services.validator.dns_lookup import Lookup
from services.validator.mx import Reason, Verdict, VerdictKind
from services.validator.resolver import make_resolver

Script = Callable[[dns.message.Message], bytes | None]

# Too short for three questions that each wait for a silent server as long as they may.
LIFETIME, TIMEOUT = 2.5, 1.0


class Server(asyncio.DatagramProtocol):
    """A name server on loopback that answers by its script, and counts the questions."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: Counter[str] = Counter()
        self.address = ""

    async def start(self) -> None:
        endpoint = asyncio.get_running_loop().create_datagram_endpoint(
            lambda: self, local_addr=("127.0.0.1", 0)
        )
        self._transport, _ = await endpoint
        self.address = "{}:{}".format(*self._transport.get_extra_info("sockname"))

    def stop(self) -> None:
        self._transport.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        self.asked[dns.rdatatype.to_text(query.question[0].rdtype)] += 1
        if (answer := self.script(query)) is not None:
            self._transport.sendto(answer, addr)


def reply(
    query: dns.message.Message,
    *answer: str,
    authority: str = "",
    flags: int = dns.flags.AA,
    rcode: dns.rcode.Rcode = dns.rcode.NOERROR,
) -> bytes:
    """Return an answer with the records, each "TYPE DATA"; `authority` is one record of the root."""
    response = dns.message.make_response(query)
    response.flags |= flags
    response.set_rcode(rcode)
    for record in answer:
        kind, _, data = record.partition(" ")
        response.answer.append(dns.rrset.from_text(query.question[0].name, 240, "IN", kind, data))
    if authority:
        kind, _, data = authority.partition(" ")
        response.authority.append(dns.rrset.from_text(dns.name.root, 900, "IN", kind, data))
    return response.to_wire()


SOA = "SOA ns.test. hostmaster.test. 1 3600 600 86400 120"
REFERRAL = "NS a.root-servers.example."


def well(query: dns.message.Message) -> bytes:
    """A domain that is its own mail host, on IPv6 only, which takes three questions."""
    if query.question[0].rdtype == dns.rdatatype.AAAA:
        return reply(query, "AAAA 2001:db8::1")
    return reply(query, authority=SOA)


def lame(query: dns.message.Message) -> bytes:
    """A server that knows only the root's servers, and does not recurse."""
    return reply(query, authority=REFERRAL, flags=0)


def no_such_name(query: dns.message.Message) -> bytes:
    """A server that denies the names of a zone that it lacks, and does not recurse."""
    return reply(query, flags=0, rcode=dns.rcode.NXDOMAIN)


def silent(query: dns.message.Message) -> None:
    """Send no answer."""


def another_id(query: dns.message.Message) -> bytes:
    wire = bytearray(well(query))
    wire[1] ^= 1
    return bytes(wire)


def another_question(query: dns.message.Message) -> bytes:
    other = dns.message.make_query("other.test", "MX")
    other.id = query.id
    return reply(other, "MX 10 other.test.")


MISBEHAVED: dict[str, Script] = {
    "REFUSED": lambda query: reply(query, rcode=dns.rcode.REFUSED),
    "SERVFAIL": lambda query: reply(query, rcode=dns.rcode.SERVFAIL),
    "FORMERR": lambda query: reply(query, rcode=dns.rcode.FORMERR),
    "NOTIMP": lambda query: reply(query, rcode=dns.rcode.NOTIMP),
    "three bytes": lambda query: b"abc",
    "another id": another_id,
    "another question": another_question,
    "the query": lambda query: query.to_wire(),
    "a referral": lame,
    "NXDOMAIN without the zone": no_such_name,
    "NXDOMAIN with a referral": lambda query: reply(
        query, authority=REFERRAL, flags=0, rcode=dns.rcode.NXDOMAIN
    ),
    "truncated, and no TCP": lambda query: reply(query, flags=dns.flags.TC),
    "silence": silent,
}

Start = Callable[..., "asyncio.Future[tuple[Server, ...]]"]


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., object]]:
    """Start a server for each script; they end with the test."""
    started: list[Server] = []

    async def start(*scripts: Script) -> tuple[Server, ...]:
        new = tuple(map(Server, scripts))
        for server in new:
            await server.start()
            started.append(server)
        return new

    yield start
    for server in started:
        server.stop()


def lookup(*asked: Server, lifetime: float = LIFETIME, timeout: float = TIMEOUT) -> Lookup:
    return Lookup(make_resolver(",".join(server.address for server in asked), timeout), lifetime=lifetime)


async def look(lookup: Lookup, domain: str = "a.test") -> Verdict:
    started = time.monotonic()
    verdict = await lookup(domain)
    assert time.monotonic() - started < LIFETIME + 1
    return verdict


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Advance the lookup's clock."""
    for module in (servers, lookups):
        monkeypatch.setattr(module, "monotonic", lambda: time.monotonic() + seconds)


# --- several servers -------------------------------------------------------------------------------


@pytest.mark.parametrize("script", MISBEHAVED.values(), ids=MISBEHAVED)
async def test_a_server_that_misbehaves_leaves_time_for_the_next(start: Start, script: Script) -> None:
    bad, good = await start(script, well)
    verdict = await look(lookup(bad, good))
    assert (verdict.kind, verdict.hosts) == (VerdictKind.OK, ((0, "a.test"),)), verdict.detail
    assert bad.asked["MX"] == 1


@pytest.mark.parametrize(
    ("scripts", "detail"),
    [
        (("SERVFAIL", "SERVFAIL"), "SERVFAIL"),
        (("SERVFAIL", "REFUSED"), "REFUSED, SERVFAIL"),
        (("silence", "SERVFAIL"), "SERVFAIL, no answer in time"),
        (("a referral", "a referral"), "a referral, not an answer"),
        (
            ("NXDOMAIN without the zone", "REFUSED"),
            "NXDOMAIN from a server that does not have the zone, REFUSED",
        ),
    ],
)
async def test_without_any_answer_the_verdict_is_transient(
    start: Start, scripts: tuple[str, ...], detail: str
) -> None:
    verdict = await look(lookup(*await start(*map(MISBEHAVED.get, scripts)), lifetime=1.0, timeout=0.2))
    assert (verdict.kind, verdict.reason) == (VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE)
    assert verdict.detail == f"MX of a.test: {detail}"


async def test_a_silent_server_is_asked_last_until_it_may_be_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, good = await start(silent, well)
    walk = lookup(dead, good, lifetime=4.5, timeout=1.5)
    await look(walk)
    assert dead.asked.total() == 1
    await asyncio.gather(*(look(walk, f"{n}.test") for n in range(10)))
    assert dead.asked.total() == 1
    # The server answers again: one question finds that out, and then it comes first again.
    dead.script = well
    later(monkeypatch, servers.REMEMBERED)
    good.asked.clear()
    await look(walk, "back.test")
    assert (dead.asked.total(), good.asked.total()) == (4, 0)


async def test_only_one_question_waits_for_a_server_that_may_answer_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, good = await start(silent, well)
    walk = lookup(dead, good, lifetime=4.5, timeout=1.5)
    await look(walk)
    later(monkeypatch, servers.REMEMBERED)
    await asyncio.gather(*(look(walk, f"{n}.test") for n in range(10)))
    assert dead.asked.total() == 2


# --- negative answers ------------------------------------------------------------------------------


async def test_a_referral_is_no_answer_and_the_domain_is_fine_once_its_server_knows_it(start: Start) -> None:
    (server,) = await start(lame)
    verdict = await look(lookup(server))
    assert (verdict.kind, verdict.reason) == (VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE)
    server.script = well
    assert (await look(lookup(server))).kind is VerdictKind.OK


async def test_a_referral_for_a_mail_hosts_address_is_no_answer(start: Start) -> None:
    def script(query: dns.message.Message) -> bytes:
        return reply(query, "MX 10 mx.test.") if query.question[0].rdtype == dns.rdatatype.MX else lame(query)

    verdict = await look(lookup(*await start(script)))
    assert verdict.detail == "mail host mx.test: a referral, not an answer; a referral, not an answer"
    assert verdict.kind is VerdictKind.TRANSIENT


async def test_an_empty_answer_without_any_flag_is_none(start: Start) -> None:
    verdict = await look(lookup(*await start(lambda query: reply(query, flags=0))))
    assert verdict.kind is VerdictKind.TRANSIENT


@pytest.mark.parametrize("flags", [dns.flags.AA, dns.flags.RA])
@pytest.mark.parametrize("authority", ["", REFERRAL])
async def test_no_data_without_soa_is_valid_for_seconds_only(
    start: Start, flags: int, authority: str
) -> None:
    verdict = await look(lookup(*await start(lambda query: reply(query, authority=authority, flags=flags))))
    assert (verdict.kind, verdict.reason) == (VerdictKind.FAILED, Reason.NO_MAIL_HOST)
    assert verdict.ttl <= 5


@pytest.mark.parametrize("flags", [dns.flags.AA, dns.flags.RA])
async def test_no_such_name_without_soa_is_valid_for_seconds_only(start: Start, flags: int) -> None:
    verdict = await look(
        lookup(*await start(lambda query: reply(query, flags=flags, rcode=dns.rcode.NXDOMAIN)))
    )
    assert (verdict.kind, verdict.reason) == (VerdictKind.FAILED, Reason.NO_SUCH_DOMAIN)
    assert verdict.ttl <= 5


async def test_a_host_without_address_and_soa_is_valid_for_seconds_only(start: Start) -> None:
    def script(query: dns.message.Message) -> bytes:
        return reply(query, *["MX 10 mx.test."][query.question[0].rdtype != dns.rdatatype.MX :])

    verdict = await look(lookup(*await start(script)))
    assert (verdict.reason, verdict.ttl <= 5) == (Reason.NO_MAIL_HOST, True)


async def test_a_domain_that_is_its_own_host_without_soa_is_valid_for_seconds_only(start: Start) -> None:
    def script(query: dns.message.Message) -> bytes:
        return reply(query, *["A 192.0.2.1"][query.question[0].rdtype != dns.rdatatype.A :])

    verdict = await look(lookup(*await start(script)))
    assert (verdict.kind, verdict.ttl <= 5) == (VerdictKind.OK, True)


async def test_negative_answers_with_soa_are_valid_for_its_time(start: Start) -> None:
    verdict = await look(lookup(*await start(lambda query: reply(query, authority=SOA, flags=0))))
    assert (verdict.reason, verdict.ttl) == (Reason.NO_MAIL_HOST, 120)


# --- asked anew ------------------------------------------------------------------------------------


async def test_a_fresh_lookup_asks_for_every_mail_host(start: Start) -> None:
    def script(query: dns.message.Message) -> bytes:
        kind = query.question[0].rdtype
        return reply(query, "MX 10 mx.test." if kind == dns.rdatatype.MX else "A 192.0.2.1")

    (server,) = await start(script)
    walk = lookup(server)
    await look(walk)
    await look(walk, "b.test")
    assert server.asked["A"] == 1
    # The host loses its address.
    server.script = lambda query: (
        script(query) if query.question[0].rdtype == dns.rdatatype.MX else reply(query, authority=SOA)
    )
    assert (await look(walk)).kind is VerdictKind.OK
    assert (await walk("a.test", fresh=True)).reason is Reason.NO_MAIL_HOST
    # The fresh result counts for all.
    assert (await look(walk, "b.test")).reason is Reason.NO_MAIL_HOST
