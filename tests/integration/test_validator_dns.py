"""Lookups against a name server on loopback that can misbehave."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from services.validator.cache import VerdictCache
from services.validator.dns_lookup import Lookup
from services.validator.mx import Reason, Verdict, VerdictKind
from services.validator.resolver import make_resolver, parse_servers

SOA = "ns.test. hostmaster.test. 1 3600 600 86400 120"
PUBLIC = ["A 192.0.2.10"]

ZONES: dict[str, list[str]] = {
    "good.test": ["MX 10 mx1.good.test.", "MX 20 mx2.good.test."],
    "mx1.good.test": PUBLIC,
    "mx2.good.test": ["AAAA 2001:db8::1"],
    "halfdead.test": ["MX 5 nowhere.test.", "MX 10 dark.test.", "MX 20 mx1.good.test."],
    "implicit.test": PUBLIC,
    "implicit6.test": ["AAAA 2001:db8::2"],
    "empty.test": ["TXT \"nothing here\""],
    "null.test": ["MX 0 ."],
    "dangling.test": ["MX 10 nowhere.test.", "MX 20 mailless.test."],
    "mailless.test": ["TXT \"no address\""],
    "alias.test": ["CNAME good.test."],
    "broken-alias.test": ["CNAME nowhere.test."],
    "outside-alias.test": ["CNAME unfollowed.good.test."],
    "unfollowed.good.test": ["MX 10 mx1.good.test."],
    "outside-nowhere.test": ["CNAME unfollowed.nowhere.test."],
    "loop.test": ["CNAME unfollowed.loop.test."],
    "unfollowed.loop.test": ["CNAME unfollowed.loop2.test."],
    "unfollowed.loop2.test": ["CNAME unfollowed.loop.test."],
    "tight-loop.test": ["CNAME tight-loop2.test."],
    "tight-loop2.test": ["CNAME tight-loop.test."],
    "mx-alias.test": ["MX 10 mx-cname.test."],
    "mx-cname.test": ["CNAME mx1.good.test."],
    "literal.test": ["MX 10 192.0.2.1."],
    "localhost-mx.test": ["MX 10 localhost."],
    "loopback.test": ["MX 10 lo.test."],
    "lo.test": ["A 127.0.0.1", "AAAA ::1"],
    "unspecified.test": ["MX 10 zero.test."],
    "zero.test": ["A 0.0.0.0", "AAAA ::ffff:127.0.0.1"],
    "lo6.test": ["MX 10 lo-and-more.test."],
    "lo-and-more.test": ["A 127.0.0.1", "AAAA 2001:db8::3"],
    "dark-host.test": ["MX 10 nowhere.test.", "MX 20 servfail.test."],
    "silent-host.test": ["MX 10 mx1.good.test.", "MX 20 silent.test."],
    "big.test": [f"MX {n} a-rather-long-name-for-a-mail-host-number-{n}.big.test." for n in range(40)],
    "a-rather-long-name-for-a-mail-host-number-7.big.test": PUBLIC,
    "shared.test": ["MX 10 mx1.good.test."],
    "shared2.test": ["MX 10 mx1.good.test.", "MX 20 nowhere.test."],
    "xn--bcher-kva.test": ["MX 10 mx1.good.test."],
    "case.test": ["MX 10 MX1.Good.TEST."],
}  # fmt: skip
TTLS: dict[str, int] = {}
RCODES = {
    "servfail.test": dns.rcode.SERVFAIL,
    "refused.test": dns.rcode.REFUSED,
    "dark.test": dns.rcode.SERVFAIL,
}


class Nameserver(asyncio.DatagramProtocol):
    """An authoritative server for `ZONES` on UDP and TCP, which counts its questions.

    It says RCODES, nothing at all to `silent.test`, and half of what it would say (TC set) over UDP where
    the answer passes 512 bytes. An alias to a name with `unfollowed.` before it is left to the asker.
    """

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        self.tcp = 0
        self.silent = asyncio.Event()
        self.transport: asyncio.DatagramTransport

    async def start(self) -> str:
        loop = asyncio.get_running_loop()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.transport, _ = await loop.create_datagram_endpoint(
            lambda: self, local_addr=("127.0.0.1", self.port)
        )
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        self.transport.close()
        self._server.close()
        await self._server.wait_closed()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if (response := self._answer(data)) is not None:
            wire = response.to_wire(max_size=65535)
            if len(wire) > 512:
                response.answer = response.answer[:0]
                response.flags |= dns.flags.TC
                wire = response.to_wire()
            self.transport.sendto(wire, addr)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tcp += 1
        size = int.from_bytes(await reader.readexactly(2), "big")
        response = self._answer(await reader.readexactly(size))
        if response is not None:
            writer.write(response.to_wire(prepend_length=True, max_size=65535))
            await writer.drain()
        writer.close()

    def _answer(self, wire: bytes) -> dns.message.Message | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        name = question.name
        key = name.to_text(omit_final_dot=True)
        self.asked[key, dns.rdatatype.to_text(question.rdtype)] += 1
        if key == "silent.test":
            self.silent.set()
            return None
        response = dns.message.make_response(query)
        if key in RCODES:
            response.set_rcode(RCODES[key])
            return response
        response.flags |= dns.flags.AA
        for _ in range(10):
            records = ZONES.get(key, [])
            alias = next((text.split()[1] for text in records if text.startswith("CNAME")), None)
            if alias is None:
                break
            response.answer.append(dns.rrset.from_text(name, 240, "IN", "CNAME", alias))
            name = dns.name.from_text(alias)
            key = name.to_text(omit_final_dot=True)
            if key.startswith("unfollowed."):
                return response
        wanted = dns.rdatatype.to_text(question.rdtype)
        data = [text.split(" ", 1)[1] for text in records if text.split()[0] == wanted]
        if data:
            response.answer.append(dns.rrset.from_text_list(name, TTLS.get(key, 240), "IN", wanted, data))
        else:
            response.authority.append(dns.rrset.from_text("test.", 900, "IN", "SOA", SOA))
            if not records:
                response.set_rcode(dns.rcode.NXDOMAIN)
        return response


@pytest.fixture
async def server() -> AsyncIterator[Nameserver]:
    nameserver = Nameserver()
    await nameserver.start()
    yield nameserver
    await nameserver.stop()


def lookup(server: Nameserver, *, lifetime: float = 5.0, timeout: float = 2.0) -> Lookup:
    return Lookup(make_resolver(f"127.0.0.1:{server.port}", timeout), lifetime=lifetime)


@pytest.mark.parametrize(
    ("domain", "kind", "reason", "hosts"),
    [
        ("good.test", VerdictKind.OK, None, ((10, "mx1.good.test"), (20, "mx2.good.test"))),
        ("case.test", VerdictKind.OK, None, ((10, "mx1.good.test"),)),
        ("halfdead.test", VerdictKind.OK, None, ((20, "mx1.good.test"),)),
        ("implicit.test", VerdictKind.OK, None, ((0, "implicit.test"),)),
        ("implicit6.test", VerdictKind.OK, None, ((0, "implicit6.test"),)),
        ("alias.test", VerdictKind.OK, None, ((10, "mx1.good.test"), (20, "mx2.good.test"))),
        ("outside-alias.test", VerdictKind.OK, None, ((10, "mx1.good.test"),)),
        ("mx-alias.test", VerdictKind.OK, None, ((10, "mx-cname.test"),)),
        ("lo6.test", VerdictKind.OK, None, ((10, "lo-and-more.test"),)),
        ("empty.test", VerdictKind.FAILED, Reason.NO_MAIL_HOST, ()),
        ("dangling.test", VerdictKind.FAILED, Reason.NO_MAIL_HOST, ()),
        ("null.test", VerdictKind.FAILED, Reason.NULL_MX, ()),
        ("nowhere.test", VerdictKind.FAILED, Reason.NO_SUCH_DOMAIN, ()),
        ("broken-alias.test", VerdictKind.FAILED, Reason.NO_SUCH_DOMAIN, ()),
        ("outside-nowhere.test", VerdictKind.FAILED, Reason.NO_SUCH_DOMAIN, ()),
        ("literal.test", VerdictKind.FAILED, Reason.UNUSABLE_MX, ()),
        ("localhost-mx.test", VerdictKind.FAILED, Reason.UNUSABLE_MX, ()),
        ("loopback.test", VerdictKind.FAILED, Reason.UNUSABLE_MX, ()),
        ("unspecified.test", VerdictKind.FAILED, Reason.UNUSABLE_MX, ()),
        ("servfail.test", VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE, ()),
        ("refused.test", VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE, ()),
        ("dark-host.test", VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE, ()),
        ("loop.test", VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE, ()),
        ("tight-loop.test", VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE, ()),
    ],
)  # fmt: skip
async def test_verdicts_from_a_real_server(
    server: Nameserver,
    domain: str,
    kind: VerdictKind,
    reason: Reason | None,
    hosts: tuple[tuple[int, str], ...],
) -> None:
    verdict = await lookup(server)(domain)
    assert (verdict.kind, verdict.reason, verdict.hosts) == (kind, reason, hosts), verdict.detail


async def test_ttls_are_the_answers(server: Nameserver) -> None:
    look = lookup(server)
    assert (await look("good.test")).ttl == 240
    # RFC 2308, section 5: the lesser of the SOA's own TTL (900) and its MINIMUM (120).
    assert (await look("nowhere.test")).ttl == 120
    assert (await look("empty.test")).ttl == 120
    assert (await look("null.test")).ttl == 240


async def test_the_trouble_is_named(server: Nameserver) -> None:
    assert (await lookup(server)("servfail.test")).detail == "MX of servfail.test: SERVFAIL"
    assert (await lookup(server)("refused.test")).detail == "MX of refused.test: REFUSED"


async def test_a_lookup_asks_only_what_the_verdict_needs(server: Nameserver) -> None:
    look = lookup(server)
    await look("null.test")
    await look("nowhere.test")
    await look("literal.test")
    assert set(server.asked) == {("null.test", "MX"), ("nowhere.test", "MX"), ("literal.test", "MX")}
    server.asked.clear()
    await look("good.test")
    assert server.asked == {
        ("good.test", "MX"): 1,
        ("mx1.good.test", "A"): 1,
        ("mx2.good.test", "A"): 1,
        ("mx2.good.test", "AAAA"): 1,
    }
    server.asked.clear()
    await look("dangling.test")
    assert server.asked == {
        ("dangling.test", "MX"): 1,
        ("nowhere.test", "A"): 1,
        ("mailless.test", "A"): 1,
        ("mailless.test", "AAAA"): 1,
    }


async def test_a_usable_host_is_asked_for_once_for_all_its_domains(server: Nameserver) -> None:
    look = lookup(server)
    for _ in range(3):
        assert (await look("shared.test")).hosts == ((10, "mx1.good.test"),)
        assert (await look("shared2.test")).hosts == ((10, "mx1.good.test"),)
    assert server.asked["mx1.good.test", "A"] == 1
    assert server.asked["nowhere.test", "A"] == 3


async def test_a_host_without_ttl_is_asked_for_each_time(
    server: Nameserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TTLS, "mx1.good.test", 0)
    look = lookup(server)
    for _ in range(3):
        assert (await look("shared.test")).kind is VerdictKind.OK
    assert server.asked["mx1.good.test", "A"] == 3


async def test_a_truncated_answer_is_asked_for_over_tcp_and_cut_to_the_best_hosts(server: Nameserver) -> None:
    verdict = await lookup(server)("big.test")
    assert verdict.hosts == ((7, "a-rather-long-name-for-a-mail-host-number-7.big.test"),)
    assert server.tcp == 1
    assert sum(kind == "A" for _, kind in server.asked) == 20


async def test_silence_ends_with_the_lifetime(server: Nameserver) -> None:
    started = time.monotonic()
    verdict = await lookup(server, lifetime=0.5, timeout=0.2)("silent.test")
    assert verdict.kind is VerdictKind.TRANSIENT
    assert verdict.detail == "MX of silent.test: no answer in time"
    assert 0.4 < time.monotonic() - started < 10
    assert server.asked["silent.test", "MX"] >= 2


async def test_a_silent_host_beside_a_usable_one_costs_a_second_and_not_the_lifetime(
    server: Nameserver,
) -> None:
    started = time.monotonic()
    verdict = await lookup(server, lifetime=30.0)("silent-host.test")
    assert verdict.hosts == ((10, "mx1.good.test"),)
    assert time.monotonic() - started < 15


async def test_after_a_dead_server_the_next_one_is_asked(server: Nameserver) -> None:
    dead = Nameserver()
    where = await dead.start()
    await dead.stop()
    look = Lookup(make_resolver(f"{where},127.0.0.1:{server.port}", 0.2), lifetime=5.0)
    assert (await look("good.test")).kind is VerdictKind.OK
    only_dead = Lookup(make_resolver(where, 0.1), lifetime=0.3)
    assert (await only_dead("good.test")).kind is VerdictKind.TRANSIENT


async def test_a_cancelled_lookup_leaves_nothing_open(server: Nameserver) -> None:
    look = lookup(server, lifetime=30.0)
    before = asyncio.all_tasks()
    walk = asyncio.create_task(look("silent-host.test"))
    await server.silent.wait()
    walk.cancel()
    await asyncio.wait([walk])
    assert asyncio.all_tasks() == before


async def test_lookups_are_bounded_and_waiting_takes_no_lifetime(server: Nameserver) -> None:
    look = Lookup(make_resolver(f"127.0.0.1:{server.port}", 0.3), lifetime=0.3, domains=1)
    silent = [asyncio.create_task(look("silent.test")) for _ in range(3)]
    good = asyncio.create_task(look("good.test"))
    assert (await good).kind is VerdictKind.OK
    assert all(task.done() for task in silent)


async def test_many_callers_of_few_domains_ask_once_for_each(server: Nameserver) -> None:
    cache = VerdictCache(lookup(server), time.monotonic)
    forms = ["good.test", "GOOD.test.", "bücher.test", "xn--bcher-kva.test", "null.test"]
    verdicts: list[Verdict] = await asyncio.gather(*(cache.resolve(form) for form in forms * 100))
    assert Counter(verdict.kind for verdict in verdicts) == {VerdictKind.OK: 400, VerdictKind.FAILED: 100}
    assert {count for (_, kind), count in server.asked.items() if kind == "MX"} == {1}


def test_servers_are_read_in_every_form() -> None:
    text = "127.0.0.1, 127.0.0.2:5353,[::1]:54,::1 , [::1]"
    assert parse_servers(text) == [
        ("127.0.0.1", 53), ("127.0.0.2", 5353), ("::1", 54), ("::1", 53), ("::1", 53),
    ]  # fmt: skip
    assert parse_servers("localhost:5300")[0][1] == 5300


@pytest.mark.parametrize("text", ["127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:x", ":53", "a..b", "''"])
def test_a_server_that_cannot_be_used_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_servers(f"127.0.0.1,{text}")
