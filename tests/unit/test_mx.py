"""The verdict table: every way in which DNS can answer, as plain values."""

from ipaddress import ip_address
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.validator.mx import (
    MAX_HOSTS,
    Address,
    Answer,
    AnswerKind,
    HostLookup,
    HostState,
    Mx,
    Reason,
    Verdict,
    VerdictKind,
    final_verdict,
    first_verdict,
    host_state,
    is_usable,
    not_a_domain,
)

DOMAIN = "example.test"
NO_DATA: Answer[Mx] = Answer(AnswerKind.NO_DATA, ttl=300)
GOOD = HostLookup(HostState.USABLE, 900)
GONE = HostLookup(HostState.ABSENT, 200)
LOOP = HostLookup(HostState.LOOPBACK, 200, "127.0.0.1")
DARK = HostLookup(HostState.UNKNOWN, 0, "SERVFAIL")


def mx(*records: Mx, ttl: int = 600) -> Answer[Mx]:
    return Answer(AnswerKind.RECORDS, records, ttl)


def verdict(answer: Answer[Mx], known: dict[str, HostLookup] | None = None) -> Verdict:
    """Return the verdict of a lookup: only the hosts that it asks for are known."""
    first = first_verdict(DOMAIN, answer)
    if isinstance(first, Verdict):
        return first
    return final_verdict(DOMAIN, answer, {name: (known or {})[name] for _, name in first})


TABLE = {
    "one good host": (mx((10, "a.test")), {"a.test": GOOD}, VerdictKind.OK, None),
    "a good host among dead ones": (
        mx((10, "a.test"), (20, "b.test"), (30, "c.test")),
        {"a.test": GONE, "b.test": DARK, "c.test": GOOD},
        VerdictKind.OK,
        None,
    ),
    "a good host beside an address": (
        mx((0, "192.0.2.1"), (5, "a.test")),
        {"a.test": GOOD},
        VerdictKind.OK,
        None,
    ),
    "a good host beside the root": (mx((0, ""), (5, "a.test")), {"a.test": GOOD}, VerdictKind.OK, None),
    "implicit": (NO_DATA, {DOMAIN: GOOD}, VerdictKind.OK, None),
    "implicit without an address": (NO_DATA, {DOMAIN: GONE}, VerdictKind.FAILED, Reason.NO_MAIL_HOST),
    "implicit on loopback": (NO_DATA, {DOMAIN: LOOP}, VerdictKind.FAILED, Reason.UNUSABLE_MX),
    "implicit in the dark": (NO_DATA, {DOMAIN: DARK}, VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE),
    "null": (mx((0, "")), {}, VerdictKind.FAILED, Reason.NULL_MX),
    "null at another preference": (mx((10, "")), {}, VerdictKind.FAILED, Reason.NULL_MX),
    "no such name": (Answer(AnswerKind.NO_NAME, ttl=60), {}, VerdictKind.FAILED, Reason.NO_SUCH_DOMAIN),
    "no answer": (
        Answer(AnswerKind.NOTHING, detail="SERVFAIL"),
        {},
        VerdictKind.TRANSIENT,
        Reason.DNS_UNAVAILABLE,
    ),
    "all hosts gone": (
        mx((10, "a.test"), (20, "b.test")),
        {"a.test": GONE, "b.test": GONE},
        VerdictKind.FAILED,
        Reason.NO_MAIL_HOST,
    ),
    "one host gone, one in the dark": (
        mx((10, "a.test"), (20, "b.test")),
        {"a.test": GONE, "b.test": DARK},
        VerdictKind.TRANSIENT,
        Reason.DNS_UNAVAILABLE,
    ),
    "a host on loopback": (mx((10, "a.test")), {"a.test": LOOP}, VerdictKind.FAILED, Reason.UNUSABLE_MX),
    "a host on loopback, one in the dark": (
        mx((10, "a.test"), (20, "b.test")),
        {"a.test": LOOP, "b.test": DARK},
        VerdictKind.TRANSIENT,
        Reason.DNS_UNAVAILABLE,
    ),
    "a host on loopback, one gone": (
        mx((10, "a.test"), (20, "b.test")),
        {"a.test": LOOP, "b.test": GONE},
        VerdictKind.FAILED,
        Reason.UNUSABLE_MX,
    ),
    "an IPv4 address": (mx((10, "192.0.2.1")), {}, VerdictKind.FAILED, Reason.UNUSABLE_MX),
    "an IPv4 address in brackets": (mx((10, "[192.0.2.1]")), {}, VerdictKind.FAILED, Reason.UNUSABLE_MX),
    "an IPv6 address": (mx((10, "2001:db8::1")), {}, VerdictKind.FAILED, Reason.UNUSABLE_MX),
    "an IPv6 address literal": (mx((10, "[ipv6:2001:db8::1]")), {}, VerdictKind.FAILED, Reason.UNUSABLE_MX),
    "localhost": (mx((10, "localhost")), {}, VerdictKind.FAILED, Reason.UNUSABLE_MX),
    "under localhost": (mx((10, "mail.localhost")), {}, VerdictKind.FAILED, Reason.UNUSABLE_MX),
    "localhost beside a host that is gone": (
        mx((10, "localhost"), (20, "a.test")),
        {"a.test": GONE},
        VerdictKind.FAILED,
        Reason.UNUSABLE_MX,
    ),
    "localhost beside a host in the dark": (
        mx((10, "localhost"), (20, "a.test")),
        {"a.test": DARK},
        VerdictKind.TRANSIENT,
        Reason.DNS_UNAVAILABLE,
    ),
}


@pytest.mark.parametrize(("answer", "known", "kind", "reason"), TABLE.values(), ids=TABLE.keys())
def test_verdict_table(
    answer: Answer[Mx], known: dict[str, HostLookup], kind: VerdictKind, reason: Reason | None
) -> None:
    got = verdict(answer, known)
    assert (got.kind, got.reason) == (kind, reason)
    assert bool(got.hosts) == (kind is VerdictKind.OK)
    assert bool(got.detail) == (kind is not VerdictKind.OK)


def test_a_host_whose_name_only_sounds_local_is_looked_up() -> None:
    assert first_verdict(DOMAIN, mx((10, "localhost.example.test"), (20, "notlocalhost"))) == (
        (10, "localhost.example.test"),
        (20, "notlocalhost"),
    )


def test_hosts_come_best_first_each_once_and_only_the_usable() -> None:
    answer = mx((30, "c.test"), (10, "b.test"), (20, "a.test"), (40, "b.test"), (5, "gone.test"))
    known = {"a.test": GOOD, "b.test": GOOD, "c.test": GOOD, "gone.test": GONE}
    assert verdict(answer, known).hosts == ((10, "b.test"), (20, "a.test"), (30, "c.test"))


def test_only_the_best_hosts_are_looked_up() -> None:
    first = first_verdict(DOMAIN, mx(*((100 - n, f"h{n}.test") for n in range(50))))
    assert isinstance(first, tuple)
    assert first == tuple((100 - n, f"h{n}.test") for n in range(49, 49 - MAX_HOSTS, -1))


def test_a_host_without_an_answer_in_time_makes_the_verdict_transient() -> None:
    got = final_verdict(DOMAIN, mx((10, "a.test"), (20, "b.test")), {"a.test": GONE})
    assert got.kind is VerdictKind.TRANSIENT
    assert "b.test" in got.detail


def test_the_detail_names_the_host_and_its_error() -> None:
    assert verdict(mx((10, "a.test")), {"a.test": DARK}).detail == "mail host a.test: SERVFAIL"
    assert verdict(mx((10, "a.test")), {"a.test": LOOP}).detail == "a.test resolves to 127.0.0.1"


def test_a_detail_fits_into_a_timeline_entry() -> None:
    long = [(n, f"{'h' * 60}{n}.test") for n in range(20)]
    detail = verdict(mx(*long), {name: GONE for _, name in long}).detail
    assert len(detail) == 400
    assert detail.endswith("...")


@pytest.mark.parametrize(
    ("answer", "known", "ttl"),
    [
        (mx((10, "a.test"), ttl=600), HostLookup(HostState.USABLE, 900), 600),
        (mx((10, "a.test"), ttl=600), HostLookup(HostState.USABLE, 120), 120),
        (mx((10, "a.test"), ttl=5), HostLookup(HostState.USABLE, 900), 60),
        (mx((10, "a.test"), ttl=86400), HostLookup(HostState.USABLE, 86400), 3600),
        (mx((10, "a.test"), ttl=600), HostLookup(HostState.ABSENT, 200), 200),
        (mx((10, "a.test"), ttl=600), HostLookup(HostState.ABSENT, 900), 300),
        (mx((10, "a.test"), ttl=600), HostLookup(HostState.LOOPBACK, 1), 30),
        (mx((0, ""), ttl=86400), GONE, 300),
        (Answer(AnswerKind.NO_NAME, ttl=86400), GONE, 300),
        (Answer(AnswerKind.NO_NAME, ttl=90), GONE, 90),
        (Answer(AnswerKind.NO_NAME, ttl=0), GONE, 30),
        (Answer(AnswerKind.NOTHING, detail="timeout"), GONE, 30),
    ],
)  # fmt: skip
def test_ttl_is_the_answers_within_bounds(answer: Answer[Mx], known: HostLookup, ttl: int) -> None:
    assert verdict(answer, {"a.test": known}).ttl == ttl


def test_ok_is_valid_while_any_usable_host_is() -> None:
    known = {
        "a.test": HostLookup(HostState.USABLE, 100),
        "b.test": HostLookup(HostState.USABLE, 200),
        "c.test": GONE,
    }
    assert verdict(mx((1, "a.test"), (2, "b.test"), (3, "c.test"), ttl=600), known).ttl == 200


def test_a_text_that_is_no_domain_does_not_exist() -> None:
    assert (not_a_domain("?").kind, not_a_domain("?").reason) == (VerdictKind.FAILED, Reason.NO_SUCH_DOMAIN)


@pytest.mark.parametrize(
    "text", ["127.0.0.1", "127.255.255.254", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0"]
)
def test_no_mail_goes_to_loopback_or_unspecified(text: str) -> None:
    assert not is_usable(ip_address(text))


@pytest.mark.parametrize("text", ["192.0.2.1", "10.0.0.1", "128.0.0.1", "2001:db8::1", "::ffff:192.0.2.1"])
def test_mail_goes_to_any_other_address(text: str) -> None:
    assert is_usable(ip_address(text))


V4, LOCAL, V6 = (ip_address(text) for text in ("192.0.2.1", "127.0.0.1", "2001:db8::1"))


def found(*addresses: Address, ttl: int = 100) -> Answer[Address]:
    return Answer(AnswerKind.RECORDS, addresses, ttl)


EMPTY: Answer[Address] = Answer(AnswerKind.NO_DATA, ttl=50)
NOTHING: Answer[Address] = Answer(AnswerKind.NOTHING, detail="REFUSED")


@pytest.mark.parametrize(
    ("answers", "state"),
    [
        ((found(V4),), HostLookup(HostState.USABLE, 100)),
        ((found(LOCAL, V4),), HostLookup(HostState.USABLE, 100)),
        ((found(LOCAL), found(V6, ttl=70)), HostLookup(HostState.USABLE, 70)),
        ((found(V4, ttl=50), found(V6, ttl=70)), HostLookup(HostState.USABLE, 70)),
        ((NOTHING, found(V6)), HostLookup(HostState.USABLE, 100)),
        ((EMPTY, found(V6)), HostLookup(HostState.USABLE, 100)),
        ((EMPTY, EMPTY), HostLookup(HostState.ABSENT, 50)),
        ((Answer(AnswerKind.NO_NAME, ttl=20),), HostLookup(HostState.ABSENT, 20)),
        ((NOTHING, EMPTY), HostLookup(HostState.UNKNOWN, 0, "REFUSED")),
        ((EMPTY, NOTHING), HostLookup(HostState.UNKNOWN, 0, "REFUSED")),
        ((found(LOCAL), NOTHING), HostLookup(HostState.UNKNOWN, 0, "REFUSED")),
        ((found(LOCAL), EMPTY), HostLookup(HostState.LOOPBACK, 50, "127.0.0.1")),
    ],
)
def test_host_state(answers: tuple[Answer[Address], ...], state: HostLookup) -> None:
    assert host_state(answers) == state


names = st.sampled_from(["", "localhost", "x.localhost", "192.0.2.1", *(f"h{n}.test" for n in range(30))])
records = st.lists(st.tuples(st.integers(0, 65535), names), min_size=1, max_size=40)
ttls = st.integers(0, 2**31 - 1)
hosts = st.builds(HostLookup, st.sampled_from(HostState), ttls)
worlds = st.dictionaries(st.sampled_from([f"h{n}.test" for n in range(30)]), hosts)


def judged(listed: list[Mx], ttl: int, world: dict[str, HostLookup]) -> Verdict:
    answer = mx(*listed, ttl=ttl)
    first = first_verdict(DOMAIN, answer)
    return first if isinstance(first, Verdict) else final_verdict(DOMAIN, answer, world)


@given(records, ttls, worlds)
def test_every_verdict_is_whole_and_within_its_bounds(
    listed: list[Mx], ttl: int, world: dict[str, HostLookup]
) -> None:
    got = judged(listed, ttl, world)
    bounds = {VerdictKind.OK: (60, 3600), VerdictKind.FAILED: (30, 300), VerdictKind.TRANSIENT: (0, 30)}[
        got.kind
    ]
    assert bounds[0] <= got.ttl <= bounds[1]
    assert (got.reason is None) == (got.kind is VerdictKind.OK) == bool(got.hosts)
    assert (got.kind is VerdictKind.TRANSIENT) == (got.reason is Reason.DNS_UNAVAILABLE)
    assert set(got.hosts) <= set(listed)
    assert list(got.hosts) == sorted(got.hosts)
    assert all(world[name].state is HostState.USABLE for _, name in got.hosts)


@given(records, ttls, worlds, st.randoms(use_true_random=False))
def test_the_order_of_the_records_does_not_matter(
    listed: list[Mx], ttl: int, world: dict[str, HostLookup], random: Random
) -> None:
    shuffled = list(listed)
    random.shuffle(shuffled)
    assert judged(shuffled, ttl, world) == judged(listed, ttl, world)


@given(st.lists(st.tuples(st.integers(0, 9), names), max_size=19), worlds, st.integers(0, 9))
def test_one_usable_host_is_enough_whatever_else_is_wrong(
    listed: list[Mx], world: dict[str, HostLookup], preference: int
) -> None:
    got = judged([*listed, (preference, "good.test")], 600, world | {"good.test": GOOD})
    assert got.kind is VerdictKind.OK
    assert "good.test" in {name for _, name in got.hosts}


@given(records, worlds)
def test_no_domain_fails_while_anything_is_unknown(listed: list[Mx], world: dict[str, HostLookup]) -> None:
    got = judged(listed, 600, world)
    if got.kind is VerdictKind.FAILED:
        first = first_verdict(DOMAIN, mx(*listed))
        asked = first if isinstance(first, tuple) else ()
        assert all(world[name].state in (HostState.ABSENT, HostState.LOOPBACK) for _, name in asked)
