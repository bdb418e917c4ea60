"""Domain names in the form that DNS takes, and names that cannot be mail hosts."""

import ipaddress
import re

import idna

__all__ = ["is_address_literal", "is_localhost", "to_ascii"]

# RFC 1035, section 2.3.4: 63 octets a label, 255 a name on the wire, which is 253 characters of text.
_ASCII_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\Z")


def to_ascii(domain: str) -> str:
    """Return the A-label form of `domain`: lower case, without a dot at the end.

    Non-ASCII names are mapped by UTS #46 (non-transitional: "ß" keeps its own name) and encoded by
    IDNA 2008 (RFC 5891). DNS judges ASCII names, as long as they fit into a question. Raises ValueError, with
    the reason as its text, for what cannot be a domain name.
    """
    name = domain.strip()
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError) as error:
            raise ValueError(f"{domain!r} is not a domain name: {error}") from error
    name = name.lower().removesuffix(".")
    if not _ASCII_NAME.match(name) or is_address_literal(name):
        raise ValueError(f"{domain!r} is not a domain name")
    return name


def is_localhost(name: str) -> bool:
    """Return whether `name` (lower case, no final dot) always means the own host (RFC 6761, section 6.3)."""
    return name == "localhost" or name.endswith(".localhost")


def is_address_literal(name: str) -> bool:
    """Return whether `name` is an IP address: `192.0.2.1`, `[192.0.2.1]`, `[IPv6:::1]`.

    An MX record must name a host (RFC 1035, section 3.3.9); an address there is a common mistake.
    """
    bare = name.removeprefix("[").removesuffix("]").lower().removeprefix("ipv6:")
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        return False
    return True
