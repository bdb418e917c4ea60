"""The verdict on a mail domain, from what the DNS answered. Pure: no I/O, no clock.

The walk that asks the questions (`lookup`) goes: MX of the domain, `first_verdict`; if that leaves hosts to
check, their addresses, `host_state` each; then `final_verdict`.
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
"""Preference and host name of an MX record, the name in lower case, without the final dot; "" is the root."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# More hosts than this are a mistake or an attack; what the best twenty do not show, the rest will not.
MAX_HOSTS = 20

_OK_TTL = (60, 3600)
_NEGATIVE_TTL = (30, 300)
# What no SOA vouches for may be a server's mistake of a moment.
_UNPROVEN_TTL = 5
_TRANSIENT_TTL = 30
_MAX_DETAIL = 400


class AnswerKind(StrEnum):
    """How the DNS answered one question."""

    RECORDS = "records"
    NO_DATA = "no data"  # the name exists, the type does not (RFC 2308, section 2.2)
    NO_NAME = "no such name"  # NXDOMAIN, at the end of any CNAMEs (RFC 6604)
    NOTHING = "nothing"  # SERVFAIL, REFUSED, timeout, nonsense: nothing is known


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """One answer: what was said, the records if any, its TTL in seconds, for `NOTHING` the trouble in words.

    The TTL of a negative one is its SOA's (RFC 2308); None: it has none."""

    said: AnswerKind
    records: tuple[T, ...] = ()
    ttl: int | None = 0
    detail: str = ""


class HostState(StrEnum):
    """What a host's addresses make of it."""

    USABLE = "is_usable"
    LOOPBACK = "has only loopback or unspecified addresses"
    ABSENT = "has no address"
    UNKNOWN = "could not be looked up"


@dataclass(frozen=True, slots=True)
class HostLookup:
    """A mail host's state and how many seconds it may be believed; None: no SOA says so."""

    state: HostState
    ttl: int | None = 0
    detail: str = ""


class VerdictKind(StrEnum):
    """`OK`: mail can be sent. `FAILED`: never, as the DNS stands. `TRANSIENT`: ask again later."""

    OK = "ok"
    FAILED = "failed"
    TRANSIENT = "transient"


class Reason(StrEnum):
    """Why a domain takes no mail, as the task's `reason` shows it."""

    NO_MAIL_HOST = "no_mail_host"
    NULL_MX = "null_mx"
    NO_SUCH_DOMAIN = "no_such_domain"
    UNUSABLE_MX = "unusable_mx"
    DNS_UNAVAILABLE = "dns_unavailable"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a domain.

    `hosts` are the usable mail hosts, best preference first, when `kind` is `OK`; otherwise `reason` is set
    and `detail` says it in words for operators. `ttl` is the seconds that the verdict may be kept, within
    60 s-1 h (ok), 30 s-5 min (failed), 30 s (transient); 5 s where it rests on a negative answer without SOA.
    """

    kind: VerdictKind
    reason: Reason | None
    hosts: tuple[Mx, ...]
    detail: str
    ttl: int


def is_usable(address: Address) -> bool:
    """Whether mail for others may go to `address`: neither loopback nor unspecified (RFC 1122, 3.2.1.3)."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return not (address.is_loopback or address.is_unspecified)


def host_state(answers: tuple[Answer[Address], ...]) -> HostLookup:
    """The state of a host from the answers to its A and AAAA questions, or to the first alone where that
    settles it: a usable address, or no such name at all (RFC 8020)."""
    addresses = [address for answer in answers for address in answer.records]
    if any(is_usable(address) for address in addresses):
        good = (answer.ttl or 0 for answer in answers if any(map(is_usable, answer.records)))
        return HostLookup(HostState.USABLE, max(good))
    if trouble := [answer.detail for answer in answers if answer.said is AnswerKind.NOTHING]:
        return HostLookup(HostState.UNKNOWN, 0, "; ".join(trouble))
    ttl = _least(answer.ttl for answer in answers)
    if addresses:
        return HostLookup(HostState.LOOPBACK, ttl, ", ".join(map(str, addresses)))
    return HostLookup(HostState.ABSENT, ttl)


def first_verdict(domain: str, answer: Answer[Mx]) -> Verdict | tuple[Mx, ...]:
    """What the MX answer alone settles, or the hosts whose addresses must be looked up, best first.

    No MX record makes the domain its own mail host, at preference 0 (RFC 5321, section 5.1).
    """
    if answer.said is AnswerKind.NOTHING:
        return _transient(f"MX of {domain}: {answer.detail}")
    if answer.said is AnswerKind.NO_NAME:
        return _failed(Reason.NO_SUCH_DOMAIN, f"{domain} does not exist", answer.ttl)
    hosts = _hosts(domain, answer)
    if not hosts:
        return _failed(Reason.NULL_MX, f"{domain} takes no mail (null MX, RFC 7505)", answer.ttl)
    askable = tuple(mx for mx in hosts if not _misnamed(mx[1]))
    return askable or _no_usable_host(answer, hosts, {})


def final_verdict(domain: str, answer: Answer[Mx], known: Mapping[str, HostLookup]) -> Verdict:
    """The verdict once the hosts that `first_verdict` asked for are looked up. One usable host is enough; one
    that is unknown (or missing from `known`) leaves hope; otherwise each host is known to be of no use."""
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
    """The verdict on what cannot be a domain name: no DNS has it."""
    return _failed(Reason.NO_SUCH_DOMAIN, detail, _NEGATIVE_TTL[1])


def _hosts(domain: str, answer: Answer[Mx]) -> tuple[Mx, ...]:
    """The hosts to try, best first, each once; none for a null MX."""
    if answer.said is AnswerKind.NO_DATA:
        return ((0, domain),)
    best: dict[str, int] = {}
    for preference, name in sorted(answer.records):
        # The root beside other hosts is a mistake (RFC 7505, section 3) and no host.
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
    """`detail` as it fits into a line of the task's timeline."""
    return detail if len(detail) <= _MAX_DETAIL else detail[: _MAX_DETAIL - 3] + "..."
