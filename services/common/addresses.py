"""Recipient addresses (RFC 5321 and 6531), checked by email-validator without the DNS."""

from __future__ import annotations

import re
from functools import lru_cache

import email_validator
from email_validator import EmailNotValidError, validate_email
from email_validator.rfc_constants import CASE_INSENSITIVE_MAILBOX_NAMES
from email_validator.syntax import validate_email_domain_name

from services.common.header_fields import ADDRESS_LIMITS, ATOM, BREAKS

__all__ = ["ascii_domain", "normalise"]

# The DNS decides whether these domains take mail. Domains outside the DNS (localhost, .local, .onion, .arpa)
# stay refused. The library reads its list at each call, so this changes it before the first one.
email_validator.SPECIAL_USE_DOMAIN_NAMES[:] = [
    name for name in email_validator.SPECIAL_USE_DOMAIN_NAMES if name not in ("test", "example", "invalid")
]

# The library accepts 254 characters, but its parser spends time on every character of a longer text.
_MAX_LENGTH = 320
_CASE_INSENSITIVE = frozenset(CASE_INSENSITIVE_MAILBOX_NAMES)
_DOMAIN_LIMITS = "a domain has 253 octets at most, and 63 octets in each label"
# The library's errors about lengths say by how much a part is too long, but not the limit.
_LENGTHS = re.compile("too (?:long|many)|so many")
# A dot-atom, and a possible host name.
_PLAIN = re.compile(rf"({ATOM}(?:\.{ATOM})*)@([A-Za-z0-9.-]+)")


def normalise(address: str) -> tuple[str, str]:
    """Return an address in its normalised form and its domain in A-labels.

    The domain is in lower case (UTS 46), the local part in NFC. Raises ValueError with the reason for
    anything but exactly one addr-spec. A display name and a domain of one label are refused too.
    """
    plain = _PLAIN.fullmatch(address) if len(address) <= 254 else None
    if plain is not None:
        # Nearly all addresses are ASCII with a domain that was seen before. The library would keep their
        # local part as it is, and spend 25 us on each.
        local, domain = plain.groups()
        known = _plain_domain(domain)
        if known and len(local) <= 64 and local.lower() not in _CASE_INSENSITIVE:
            return f"{local}@{known}", known
    if len(address) > _MAX_LENGTH:
        raise ValueError(ADDRESS_LIMITS)
    if BREAKS.search(address):
        raise ValueError("control characters and line separators cannot stand in an address")
    try:
        found = validate_email(address, strict=True, check_deliverability=False)
    except EmailNotValidError as error:
        raise _refusal(error, ADDRESS_LIMITS) from None
    # The library counts characters, the RFC octets.
    if len(found.local_part.encode()) > 64:
        raise ValueError(ADDRESS_LIMITS)
    return found.normalized, found.ascii_domain


@lru_cache(maxsize=4096)
def _plain_domain(domain: str) -> str:
    """Return a valid domain without A-labels in its stored form; an empty text for any other."""
    try:
        found = validate_email_domain_name(domain)
    except EmailNotValidError:
        return ""
    return found["domain"] if found["domain"] == found["ascii_domain"] else ""


def ascii_domain(domain: str) -> str:
    """Return a domain in A-labels, as tasks have it; raise ValueError for an invalid mail domain."""
    if len(domain) > _MAX_LENGTH:
        raise ValueError(_DOMAIN_LIMITS)
    try:
        return validate_email_domain_name(domain)["ascii_domain"]
    except EmailNotValidError as error:
        raise _refusal(error, _DOMAIN_LIMITS) from None


def _refusal(error: EmailNotValidError, limits: str) -> ValueError:
    return ValueError(limits if _LENGTHS.search(str(error)) else str(error))
