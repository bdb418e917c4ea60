"""Recipient addresses: RFC 5321 and 6531 as email-validator reads them, nothing asked of the DNS."""

from __future__ import annotations

import re
from functools import lru_cache

import email_validator
from email_validator import EmailNotValidError, validate_email
from email_validator.rfc_constants import CASE_INSENSITIVE_MAILBOX_NAMES
from email_validator.syntax import validate_email_domain_name

from services.common.header_fields import ADDRESS_LIMITS, ATOM, BREAKS

__all__ = ["ascii_domain", "normalise"]

# Domains like any other here: whether they take mail is the DNS's to say. What has no place in the
# DNS at all (localhost, .local, .onion, .arpa) stays refused. The library reads its own list at each
# call, so it is changed once, before the first one.
email_validator.SPECIAL_USE_DOMAIN_NAMES[:] = [
    name for name in email_validator.SPECIAL_USE_DOMAIN_NAMES if name not in ("test", "example", "invalid")
]

# The library's own bound is 254; its parser takes time for every character that it is given.
_LONGEST = 320
_DOMAIN_LIMITS = "a domain has 253 octets at most, and 63 octets in each label"
# What the library says of lengths: by how much, never beyond what.
_LENGTHS = re.compile("too (?:long|many)|so many")
# A dot-atom, and what may be a host name.
_PLAIN = re.compile(rf"({ATOM}(?:\.{ATOM})*)@([A-Za-z0-9.-]+)")


def normalise(address: str) -> tuple[str, str]:
    """Return an address in its normalised form and its domain in A-labels.

    The domain is lower case (UTS 46), the local part in NFC. Raises ValueError saying what is wrong:
    anything that is not exactly one addr-spec, a display name and a domain of one label included.
    """
    plain = _PLAIN.fullmatch(address) if len(address) <= 254 else None
    if plain is not None:
        # What nearly all addresses are: ASCII throughout, so that the library would keep the local part
        # as it is, and has seen the domain before. It takes 25 us for each.
        local, domain = plain.groups()
        known = _plain_domain(domain)
        if known and len(local) <= 64 and local.lower() not in CASE_INSENSITIVE_MAILBOX_NAMES:
            return f"{local}@{known}", known
    if len(address) > _LONGEST:
        raise ValueError(ADDRESS_LIMITS)
    if BREAKS.search(address):
        raise ValueError("control characters and line separators cannot stand in an address")
    try:
        found = validate_email(address, strict=True, check_deliverability=False)
    except EmailNotValidError as error:
        raise _refusal(error, ADDRESS_LIMITS) from None
    # The library counts characters.
    if len(found.local_part.encode()) > 64:
        raise ValueError(ADDRESS_LIMITS)
    return found.normalized, found.ascii_domain


@lru_cache(maxsize=4096)
def _plain_domain(domain: str) -> str:
    """Return a valid domain without A-labels as it is stored, empty for any other."""
    try:
        found = validate_email_domain_name(domain)
    except EmailNotValidError:
        return ""
    return found["domain"] if found["domain"] == found["ascii_domain"] else ""


def ascii_domain(domain: str) -> str:
    """Return a domain in the A-label form that tasks have; raise ValueError where it is no mail domain."""
    if len(domain) > _LONGEST:
        raise ValueError(_DOMAIN_LIMITS)
    try:
        return validate_email_domain_name(domain)["ascii_domain"]
    except EmailNotValidError as error:
        raise _refusal(error, _DOMAIN_LIMITS) from None


def _refusal(error: EmailNotValidError, limits: str) -> ValueError:
    return ValueError(limits if _LENGTHS.search(str(error)) else str(error))
