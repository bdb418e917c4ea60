"""The verdict on a mail domain, from the answers of DNS. Pure: no I/O, no clock.

A lookup (`lookup.py`) asks for the domain's MX records and calls `first_verdict`. If that leaves hosts to
check, it asks for their addresses, calls `host_state` for each, and then `final_verdict`.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from services.validator.names import is_address_literal, is_localhost

__all__ = [
    "MAX_HOSTS",
    "Address",
    "Answer",
    "AnswerKind",
    "HostLookup",
    "HostState",
    "Mx",
    "Reason",
    "Verdict",
    "VerdictKind",
    "final_verdict",
    "first_verdict",
    "host_state",
    "is_usable",
    "not_a_domain",
]

T = TypeVar("T")

Mx = tuple[int, str]
"""An MX record: its preference and host name, in lower case, without the final dot; "" is the root."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# More hosts than this are a mistake or an attack. If the best twenty are of no use, the others are not
# either.
MAX_HOSTS = 20

_OK_TTL = (60, 3600)
_NEGATIVE_TTL = (30, 300)
# A negative answer without an SOA may be a server's brief mistake.
_UNPROVEN_TTL = 5
_TRANSIENT_TTL = 30
_MAX_DETAIL = 400


class AnswerKind(StrEnum):
    """How DNS answered one question."""

    RECORDS = "records"
    NO_DATA = "no data"  # the name exists, the type does not (RFC 2308, section 2.2)
    NO_NAME = "no such name"  # NXDOMAIN, at the end of any CNAMEs (RFC 6604)
    NOTHING = "nothing"  # SERVFAIL, REFUSED, a timeout or garbage: nothing is known


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """One answer: its kind, its records, its TTL in seconds; for `NOTHING` the detail says what went wrong.

    A negative answer's TTL is its SOA's (RFC 2308); None: it has no SOA."""

    kind: AnswerKind
    records: tuple[T, ...] = ()
    ttl: int | None = 0
    detail: str = ""


class HostState(StrEnum):
    """What a host's addresses show."""

    USABLE = "usable"
    LOOPBACK = "has only loopback or unspecified addresses"
    ABSENT = "has no address"
    UNKNOWN = "could not be looked up"


@dataclass(frozen=True, slots=True)
class HostLookup:
    """A mail host's state, and the seconds for which it may be remembered; None: there is no SOA."""

    state: HostState
    ttl: int | None = 0
    detail: str = ""


class VerdictKind(StrEnum):
    """`OK`: the domain takes mail. `FAILED`: by its records it takes none. `TRANSIENT`: ask again later."""

    OK = "ok"
    FAILED = "failed"
    TRANSIENT = "transient"


class Reason(StrEnum):
    """Why a domain takes no mail: the task's `reason`."""

    NO_MAIL_HOST = "no_mail_host"
    NULL_MX = "null_mx"
    NO_SUCH_DOMAIN = "no_such_domain"
    UNUSABLE_MX = "unusable_mx"
    DNS_UNAVAILABLE = "dns_unavailable"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a domain.

    If `kind` is `OK`, `hosts` are the usable mail hosts, best preference first. Otherwise there is a
    `reason`, and `detail` explains it to operators. The verdict may be kept for `ttl` seconds. An ok verdict
    has 60 s to 1 h, a failed one 30 s to 5 min, a transient one 30 s. After a negative answer without an SOA
    it is 5 s.
    """

    kind: VerdictKind
    reason: Reason | None
    hosts: tuple[Mx, ...]
    detail: str
    ttl: int


def is_usable(address: Address) -> bool:
    """Return whether mail may go to `address`: it is neither loopback nor unspecified (RFC 1122, 3.2.1.3)."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return not (address.is_loopback or address.is_unspecified)


def host_state(answers: tuple[Answer[Address], ...]) -> HostLookup:
    """Return a host's state from the answers to its A and AAAA questions.

    The first answer suffices if it has a usable address, or if the name does not exist (RFC 8020).
    """
    addresses = [address for answer in answers for address in answer.records]
    if any(is_usable(address) for address in addresses):
        good = (answer.ttl or 0 for answer in answers if any(map(is_usable, answer.records)))
        return HostLookup(HostState.USABLE, max(good))
    if trouble := [answer.detail for answer in answers if answer.kind is AnswerKind.NOTHING]:
        return HostLookup(HostState.UNKNOWN, 0, "; ".join(trouble))
    ttl = _least(answer.ttl for answer in answers)
    if addresses:
        return HostLookup(HostState.LOOPBACK, ttl, ", ".join(map(str, addresses)))
    return HostLookup(HostState.ABSENT, ttl)


def first_verdict(domain: str, answer: Answer[Mx]) -> Verdict | tuple[Mx, ...]:
    """Return the verdict if the MX answer settles it, else the hosts to look up, best first.

    A domain without MX records is its own mail host, at preference 0 (RFC 5321, section 5.1).
    """
    if answer.kind is AnswerKind.NOTHING:
        return _transient(f"MX of {domain}: {answer.detail}")
    if answer.kind is AnswerKind.NO_NAME:
        return _failed(Reason.NO_SUCH_DOMAIN, f"{domain} does not exist", answer.ttl)
    hosts = _hosts(domain, answer)
    if not hosts:
        return _failed(Reason.NULL_MX, f"{domain} takes no mail (null MX, RFC 7505)", answer.ttl)
    askable = tuple(mx for mx in hosts if not _misnamed(mx[1]))
    return askable or _no_usable_host(answer, hosts, {})


def final_verdict(domain: str, answer: Answer[Mx], known: Mapping[str, HostLookup]) -> Verdict:
    """Return the verdict once the hosts of `first_verdict` are looked up.

    One usable host makes it `OK`. Otherwise an unknown host, or one missing in `known`, makes it `TRANSIENT`.
    Without either it is `FAILED`.
    """
    hosts = _hosts(domain, answer)
    unknown = HostLookup(HostState.UNKNOWN, 0, "no answer in time")
    found = {name: known.get(name, unknown) for _, name in hosts if not _misnamed(name)}
    good = tuple(mx for mx in hosts if mx[1] in found and found[mx[1]].state is HostState.USABLE)
    if good:
        ttl = _least([answer.ttl, max(found[name].ttl or 0 for _, name in good)])
        return Verdict(VerdictKind.OK, None, good, "", _within(_OK_TTL, ttl))
    if dark := [f"{name}: {host.detail}" for name, host in found.items() if host.state is HostState.UNKNOWN]:
        return _transient(f"mail host {', '.join(dark)}")
    return _no_usable_host(answer, hosts, found)


def not_a_domain(detail: str) -> Verdict:
    """Return the verdict on a text that cannot be a domain name."""
    return _failed(Reason.NO_SUCH_DOMAIN, detail, _NEGATIVE_TTL[1])


def _hosts(domain: str, answer: Answer[Mx]) -> tuple[Mx, ...]:
    """Return the hosts to try, best first, each once; none for a null MX."""
    if answer.kind is AnswerKind.NO_DATA:
        return ((0, domain),)
    best: dict[str, int] = {}
    for preference, name in sorted(answer.records):
        # A null MX beside other hosts is a mistake (RFC 7505, section 3), and no host.
        if name:
            best.setdefault(name, preference)
    return tuple((preference, name) for name, preference in best.items())[:MAX_HOSTS]


def _misnamed(name: str) -> bool:
    return is_address_literal(name) or is_localhost(name)


def _no_usable_host(answer: Answer[Mx], hosts: tuple[Mx, ...], found: Mapping[str, HostLookup]) -> Verdict:
    misnamed = [f"{name} is no host name for mail" for _, name in hosts if _misnamed(name)]
    looped = [f"{n} resolves to {h.detail}" for n, h in found.items() if h.state is HostState.LOOPBACK]
    absent = [f"{n} {h.state}" for n, h in found.items() if h.state is HostState.ABSENT]
    reason = Reason.UNUSABLE_MX if misnamed or looped else Reason.NO_MAIL_HOST
    ttl = _least([answer.ttl, *(host.ttl for host in found.values())])
    return _failed(reason, "; ".join(misnamed + looped + absent), ttl)


def _failed(reason: Reason, detail: str, ttl: int | None) -> Verdict:
    return Verdict(VerdictKind.FAILED, reason, (), _short(detail), _within(_NEGATIVE_TTL, ttl))


def _transient(detail: str) -> Verdict:
    return Verdict(VerdictKind.TRANSIENT, Reason.DNS_UNAVAILABLE, (), _short(detail), _TRANSIENT_TTL)


def _least(ttls: Iterable[int | None]) -> int | None:
    known = list(ttls)
    return None if None in known else min(ttl for ttl in known if ttl is not None)


def _within(bounds: tuple[int, int], ttl: int | None) -> int:
    low, high = bounds
    return _UNPROVEN_TTL if ttl is None else max(low, min(ttl, high))


def _short(detail: str) -> str:
    """Return `detail`, cut to fit into an entry of the timeline."""
    return detail if len(detail) <= _MAX_DETAIL else detail[: _MAX_DETAIL - 3] + "..."
