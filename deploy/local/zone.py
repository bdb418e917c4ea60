"""The mail domains that the local name server knows: some take mail, the others fail in every way.

The first label under `test.` or `example.` says what a domain is, so `good.test` and `good.example` are
alike. `python3 -m deploy.local.dns --table` prints the TABLE of labels. `example.com`, `.net` and `.org` take
mail. No other name exists. All addresses are in 192.0.2.0/24 and 2001:db8::/32 (RFC 5737, RFC 3849).

A label that misbehaves applies to any name below it too (`a.flaky-2.test`, `b.flaky-2.test`). Each such name
has a count of its own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import dns.name
import dns.rdatatype

__all__ = ["TABLE", "Misbehaviour", "misbehaviour", "records"]

Records = dict[str, tuple[str, ...]]

GOOD: Records = {"MX": ("10 mx1.post.test.", "20 mx2.post.test.")}
TLDS = ("test", "example")

# First label: (what the domain is, its records). A name with other records only exists without the rest.
ZONE: dict[str, tuple[str, Records]] = {
    "good": ("two mail hosts: ok", GOOD),
    "xn--bcher-kva": ("bücher, an IDN domain: ok", GOOD),
    "implicit": ("no MX but an address: ok (RFC 5321, 5.1)", {"A": ("192.0.2.20",)}),
    "v6": ("one mail host, on IPv6 only: ok", {"MX": ("10 v6.post.test.",)}),
    "mixed": ("one mail host is gone, one is well: ok", {"MX": ("10 gone.post.test.", "20 mx1.post.test.")}),
    "alias": ("CNAME to good.test: ok", {"CNAME": ("good.test.",)}),
    "nomail": ("exists, has neither MX nor address: no_mail_host", {"TXT": ('"no mail here"',)}),
    "deadmx": (
        "no mail host exists: no_mail_host",
        {"MX": ("10 gone.post.test.", "20 lost.post.test.")},
    ),
    "barehost": ("the mail host exists without address: no_mail_host", {"MX": ("10 bare.post.test.",)}),
    "nullmx": ("takes no mail and says so: null_mx (RFC 7505)", {"MX": ("0 .",)}),
    "dangling": ("CNAME to a name that does not exist: no_such_domain", {"CNAME": ("nosuch.test.",)}),
    "localmx": ("mail host is localhost: unusable_mx", {"MX": ("10 localhost.",)}),
    "literal": ("mail host is an IP literal: unusable_mx", {"MX": ("10 192.0.2.9.",)}),
    "loopback": ("mail host resolves to 127.0.0.1 and ::1: unusable_mx", {"MX": ("10 loop.post.test.",)}),
    "unspecified": ("mail host resolves to 0.0.0.0: unusable_mx", {"MX": ("10 zero.post.test.",)}),
    "softmx": (
        "one mail host is gone, the other SERVFAIL: dns_unavailable",
        {"MX": ("10 gone.post.test.", "20 mx.servfail.test.")},
    ),
}

HOSTS: dict[str, Records] = {
    "mx1": {"A": ("192.0.2.11",)},
    "mx2": {"A": ("192.0.2.12",)},
    "v6": {"AAAA": ("2001:db8::25",)},
    "bare": {"TXT": ('"no address"',)},
    "loop": {"A": ("127.0.0.1",), "AAAA": ("::1",)},
    "zero": {"A": ("0.0.0.0",)},
}

# The labels that stand for many names.
FORMS = {
    "d0 ... d99": "as good: ok",
    "*.ok": "any name below ok.test, as good: ok",
    "servfail": "SERVFAIL always: dns_unavailable",
    "refused": "REFUSED always: dns_unavailable",
    "timeout": "no answer at all: dns_unavailable",
    "truncated": "truncated over UDP, whole over TCP: ok",
    "delay-N": "as good, N milliseconds late",
    "flaky, flaky-N": "SERVFAIL to the first question (the first N), then as good",
    "anything else": "NXDOMAIN: no_such_domain",
}

TABLE = {**{label: text for label, (text, _) in ZONE.items()}, **FORMS}


@dataclass(frozen=True, slots=True)
class Misbehaviour:
    """How the server answers a name wrongly: at the first `first` questions, or always when that is 0."""

    kind: str
    milliseconds: int = 0
    first: int = 0


def _plain(kind: str) -> Callable[[re.Match[str]], Misbehaviour]:
    return lambda match: Misbehaviour(kind)


MISBEHAVIOURS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Misbehaviour]], ...] = (
    (re.compile("servfail"), _plain("servfail")),
    (re.compile("refused"), _plain("refused")),
    (re.compile("timeout"), _plain("timeout")),
    (re.compile("nxdomain"), _plain("nxdomain")),
    (re.compile("truncated"), _plain("truncated")),
    (re.compile(r"delay-(\d{1,5})"), lambda match: Misbehaviour("delay", milliseconds=int(match[1]))),
    (re.compile(r"flaky(?:-(\d{1,3}))?"), lambda match: Misbehaviour("servfail", first=int(match[1] or 1))),
)


def misbehaviour(label: str) -> Misbehaviour | None:
    """Return the misbehaviour that a label such as `delay-300` stands for; None for any other label."""
    for pattern, make in MISBEHAVIOURS:
        if match := pattern.fullmatch(label):
            return make(match)
    return None


def records(name: dns.name.Name) -> Records | None:
    """Return the record sets of a lower-case name by type; None when the name does not exist."""
    labels = [label.decode("ascii", "replace") for label in reversed(name.labels) if label]
    if labels in (["com"], ["net"], ["org"], *([tld] for tld in TLDS)):
        return {}
    if len(labels) == 2 and labels[0] in {"com", "net", "org"} and labels[1] == "example":
        return GOOD
    if not labels or labels[0] not in TLDS:
        return None
    if labels[1] == "post":
        return {} if len(labels) == 2 else HOSTS.get(".".join(reversed(labels[2:])))
    if misbehaviour(labels[1]):
        return {**GOOD, "A": ("192.0.2.13",)}
    if labels[1] == "ok":
        return GOOD
    if len(labels) == 2 and (labels[1] in ZONE or re.fullmatch(r"d\d{1,2}", labels[1])):
        return ZONE[labels[1]][1] if labels[1] in ZONE else GOOD
    return None
