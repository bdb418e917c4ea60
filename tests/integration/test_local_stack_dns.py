"""The local name server: its names, and its misbehaviours."""

import json
import os
import socket
import time
from pathlib import Path

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode
import pytest

from deploy.local.dns import NameServer
from deploy.local.forwarding import Forwarder
from tests.stack import Infra


def _ask(
    infra: Infra, name: str, kind: str = "MX", *, tcp: bool = False, timeout: float = 3
) -> dns.message.Message:
    host, _, port = infra.dns.partition(":")
    query = dns.message.make_query(name, kind)
    send = dns.query.tcp if tcp else dns.query.udp
    return send(query, host, port=int(port), timeout=timeout)


def _texts(reply: dns.message.Message) -> list[str]:
    return sorted(str(record) for rrset in reply.answer for record in rrset)


GOOD = ["10 mx1.post.test.", "20 mx2.post.test."]


@pytest.mark.parametrize(
    "name",
    [
        "good.test",
        "good.example",
        "GOOD.test",
        "d0.test",
        "d99.test",
        "any.ok.test",
        "a.b.ok.test",
        "example.com",
        "xn--bcher-kva.test",
    ],
)
def test_good_domains(infra: Infra, name: str) -> None:
    for tcp in (False, True):
        reply = _ask(infra, name, tcp=tcp)
        assert reply.flags & dns.flags.AA
        assert _texts(reply) == GOOD
    assert _texts(_ask(infra, "mx1.post.test", "A")) == ["192.0.2.11"]


@pytest.mark.parametrize(
    ("name", "kind", "answer"),
    [
        ("implicit.test", "MX", []),
        ("implicit.test", "A", ["192.0.2.20"]),
        ("nomail.test", "MX", []),
        ("nomail.test", "A", []),
        ("nullmx.test", "MX", ["0 ."]),
        ("localmx.test", "MX", ["10 localhost."]),
        ("literal.test", "MX", ["10 192.0.2.9."]),
        ("loop.post.test", "A", ["127.0.0.1"]),
        ("loop.post.test", "AAAA", ["::1"]),
        ("zero.post.test", "A", ["0.0.0.0"]),
        ("v6.post.test", "A", []),
        ("v6.post.test", "AAAA", ["2001:db8::25"]),
        ("alias.test", "MX", sorted(["good.test.", *GOOD])),
    ],
)
def test_records(infra: Infra, name: str, kind: str, answer: list[str]) -> None:
    reply = _ask(infra, name, kind)
    assert reply.rcode() == dns.rcode.NOERROR
    assert _texts(reply) == answer
    # An empty answer has an SOA record, which makes it cacheable (RFC 2308).
    assert bool(reply.authority) == (not answer)


@pytest.mark.parametrize(
    "name", ["nosuch.test", "gone.post.test", "d100.test", "x.good.test", "elsewhere.net", "dangling.test"]
)
def test_names_that_do_not_exist(infra: Infra, name: str) -> None:
    reply = _ask(infra, name)
    assert reply.rcode() == dns.rcode.NXDOMAIN
    assert reply.authority


@pytest.mark.parametrize(("name", "code"), [("servfail.test", "SERVFAIL"), ("a.refused.example", "REFUSED")])
def test_refusals(infra: Infra, name: str, code: str) -> None:
    assert _ask(infra, name).rcode() == dns.rcode.from_text(code)


def test_a_name_without_an_answer(infra: Infra) -> None:
    with pytest.raises(dns.exception.Timeout):
        _ask(infra, "timeout.test", timeout=0.3)


def test_truncation_is_over_udp_only(infra: Infra) -> None:
    assert _ask(infra, "truncated.test").flags & dns.flags.TC
    assert _texts(_ask(infra, "truncated.test", tcp=True)) == GOOD


def test_delay(infra: Infra) -> None:
    began = time.monotonic()
    assert _texts(_ask(infra, "delay-200.test")) == GOOD
    assert 0.2 <= time.monotonic() - began < 2


def test_each_flaky_name_has_its_own_count(infra: Infra) -> None:
    for name, times in (("a.flaky-2.test", 2), ("b.flaky-2.test", 2), ("c.flaky.test", 1)):
        for _ in range(times):
            assert _ask(infra, name).rcode() == dns.rcode.SERVFAIL
        for _ in range(3):
            assert _texts(_ask(infra, name)) == GOOD


@pytest.mark.breaks_servers
def test_the_control_file_makes_a_name_misbehave_and_resets_the_counts(servers: Infra) -> None:
    assert _ask(servers, "d1.flaky.test").rcode() == dns.rcode.SERVFAIL
    assert _texts(_ask(servers, "d1.test")) == GOOD
    servers.control_dns(**{"d1.test": "servfail", "d2.test": "nxdomain"})
    assert _ask(servers, "d1.test").rcode() == dns.rcode.SERVFAIL
    assert _ask(servers, "d2.test").rcode() == dns.rcode.NXDOMAIN
    assert _ask(servers, "d1.flaky.test").rcode() == dns.rcode.SERVFAIL
    servers.control_dns(**{"*": "refused"})
    assert _ask(servers, "d3.test").rcode() == dns.rcode.REFUSED
    servers.control_dns()
    assert _texts(_ask(servers, "d1.test")) == GOOD


def test_garbage_is_not_answered(tmp_path: Path) -> None:
    server = NameServer(tmp_path / "control.json")
    for garbage in (b"", b"\0", b"\xff" * 40):
        assert server.answer(garbage, tcp=False) == (None, 0)


def test_a_repeated_question_gets_the_same_answer_with_its_own_id() -> None:
    server = NameServer(None)
    query = dns.message.make_query("good.test", "MX")
    answers = []
    for number in (1, 2):
        query.id = number
        wire, _ = server.answer(query.to_wire(), tcp=False)
        assert wire
        answers.append(dns.message.from_wire(wire))
    assert [answer.id for answer in answers] == [1, 2]
    assert answers[0].answer == answers[1].answer


def test_a_wrong_control_file_changes_nothing(tmp_path: Path) -> None:
    control = tmp_path / "control.json"
    control.write_text(json.dumps({"names": {"good.test": "servfail"}}))
    server = NameServer(control)
    question = dns.message.make_query("good.test", "MX").to_wire()
    for number, text in enumerate((None, "{", '{"names": {"good.test": "sideways"}}')):
        if text:
            control.write_text(text)
            os.utime(control, (number, number))
        wire, _ = server.answer(question, tcp=False)
        assert wire
        assert dns.message.from_wire(wire).rcode() == dns.rcode.SERVFAIL


@pytest.mark.parametrize(
    ("name", "forwarded"),
    [("good.test", False), ("a.b.TEST", False), ("test", False), ("good.example", True), ("protest", True)],
)
def test_all_names_outside_test_are_forwarded(name: str, forwarded: bool) -> None:
    question = dns.message.make_query(name, "MX").to_wire()
    assert Forwarder([]).takes(question) == forwarded


def test_garbage_is_not_forwarded() -> None:
    assert not any(Forwarder([]).takes(garbage) for garbage in (b"", b"\0", b"\xff" * 40))


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_forwarded_question_gets_the_resolvers_answer(infra: Infra, tcp: bool) -> None:
    host, _, port = infra.dns.partition(":")
    query = dns.message.make_query("good.example", "MX")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        forwarder = Forwarder([("127.0.0.1", silent.getsockname()[1]), (host, int(port))], seconds=0.2)
        reply = dns.message.from_wire(await forwarder.answer(query.to_wire(), tcp=tcp))
    assert reply.id == query.id
    assert _texts(reply) == GOOD


async def test_a_truncated_answer_is_passed_on_so_that_the_client_asks_over_tcp(infra: Infra) -> None:
    host, _, port = infra.dns.partition(":")
    question = dns.message.make_query("truncated.example", "MX").to_wire()
    forwarder = Forwarder([(host, int(port))])
    assert dns.message.from_wire(await forwarder.answer(question, tcp=False)).flags & dns.flags.TC
    assert _texts(dns.message.from_wire(await forwarder.answer(question, tcp=True))) == GOOD


async def test_a_forwarded_question_that_nobody_answers_is_servfail() -> None:
    query = dns.message.make_query("good.example", "MX")
    reply = dns.message.from_wire(await Forwarder([]).answer(query.to_wire(), tcp=False))
    assert (reply.rcode(), reply.id) == (dns.rcode.SERVFAIL, query.id)
