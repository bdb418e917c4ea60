"""Parses header fields by the grammars of their classes (RFC 5322, 2047, 2369, 2919, 5703, 9057). Pure.

RFC 2047 lets a sender encode text in a field, but no addresses, URIs, ids or tokens. This module therefore
parses a field with a known name and writes it again in ASCII. Any other field is unstructured text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from email.errors import HeaderParseError, NonASCIILocalPartDefect, ObsoleteHeaderDefect
from email.header import Header, decode_header, make_header
from email.headerregistry import Address, AddressHeader, Group, HeaderRegistry
from functools import lru_cache
from typing import NamedTuple

import idna

__all__ = ["ADDRESS_LIMITS", "ATOM", "BREAKS", "Mailbox", "canonical", "mailbox"]


class Mailbox(NamedTuple):
    """A decoded display name, which may be empty, and an addr-spec with its domain in A-labels."""

    name: str
    address: str


_MAILBOXES_FORM = (
    "takes mailboxes, comma separated: address or Name <address>;"
    ' a name with a comma or the like stands in quotes: "Care Team, Billing" <care@example.com>'
)
_MAILBOX_FORM = (
    "takes one mailbox: address or Name <address>;"
    ' a name with a comma or the like stands in quotes: "Shop, Inc." <shop@example.com>'
)
_URIS_FORM = "takes URIs, <URI>, comma separated; a URI is ASCII (RFC 3986): ü is written %C3%BC"
_IDS_FORM = "takes message ids, <left@right>, in ASCII"
_LIST_ID_FORM = "takes an ASCII id, after a name if there is one: Our news <news.example.org>"
_KEYWORDS_FORM = (
    'takes phrases, comma separated; one with a comma or the like stands in quotes: news, "care, billing"'
)
_TOKENS_FORM = "takes printable ASCII without encoded words"
ADDRESS_LIMITS = (
    "an address has 254 octets at most, 64 octets before its @ and 63 octets in each label after it"
)
"""The limits of RFC 5321 section 4.5.3.1 and RFC 1035 section 2.3.4, as an error text."""

_parser = HeaderRegistry()
# RFC 5322 section 4 accepts obsolete syntax but forbids generating it, so it is written again. The parser
# also reports a local part outside ASCII as a defect, since it needs SMTPUTF8.
_TOLERATED = (ObsoleteHeaderDefect, NonASCIILocalPartDefect)

BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that some mail reader takes for a line end, and all other control characters."""
ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
"""An atom of RFC 5322 section 3.2.3, without the white space and comments around it."""
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_PHRASE = rf"{ATOM}(?: {ATOM})*"
_PLAIN_PHRASE = re.compile(_PHRASE)
_BARE = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.\u00a1-\u2027\u202a-\U0010ffff-]+"
_BARE_PHRASE = re.compile(rf"{_BARE}(?: {_BARE})*")
# A comma within quotes separates no keywords.
_KEYWORD = r'(?:"(?:[^"\\]|\\.)*"|[^",])+'
_ONE_KEYWORD, _KEYWORDS = re.compile(_KEYWORD), re.compile(rf"{_KEYWORD}(?:,{_KEYWORD})*")
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Za-z:.]+\]")
_ADDRESS = rf"{ATOM}(?:\.{ATOM})*@{_LABEL}(?:\.{_LABEL})*"
_PLAIN_MAILBOX = re.compile(rf"({_ADDRESS})|{_PHRASE} <({_ADDRESS})>")
_WORD = r"=\?[!->@-~]+\?[BbQq]\?[!->@-~]*\?="
_ENCODED_WORD = re.compile(_WORD)
_ADJACENT_WORDS = re.compile(rf"{_WORD}(?:[ \t]+{_WORD})+")
_COMMENTS = r"[ \t]*(?:\([^()\\]*\)[ \t]*)*"
_URI = r"<[A-Za-z][A-Za-z0-9+.-]*:(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+>"
_URIS = re.compile(rf"{_COMMENTS}{_URI}{_COMMENTS}(?:,{_COMMENTS}{_URI}{_COMMENTS})*")
_NO = re.compile(rf"[Nn][Oo]{_COMMENTS}")
_IDS = re.compile(r"(?:[ \t]*<[!-;=?A-~]+@[!-;=?A-~]+>)+[ \t]*")
_LIST_ID = re.compile(rf"(?=.{{1,255}}\Z){ATOM}(?:\.{ATOM})+")

# RFC 2047 section 2 limits a line with an encoded word to 76 characters. This is the longest field name.
_WORD_LENGTH = 76 - len("Disposition-Notification-To: ")


def canonical(name: str, value: str) -> str:
    """Return the value of a field as a mail contains it, in ASCII. An unstructured value stays as it is.

    Takes at most 40 us a character. Raises ValueError with the accepted form where the value does not match
    the class of the field's name.
    """
    parse = _CLASSES.get(name.lower())
    return value if parse is None else parse(value)


def mailbox(value: str) -> Mailbox:
    """Parse a value that is exactly one mailbox.

    The local part may be UTF-8 (RFC 6531), but not quoted. Raises ValueError with the accepted form.
    """
    groups = _groups(value, _MAILBOX_FORM)
    if len(groups) != 1 or groups[0].display_name is not None:
        raise ValueError(_MAILBOX_FORM)
    [found] = groups[0].addresses
    address = _addr_spec(found, value, _MAILBOX_FORM)
    if address.startswith('"') or not address.isprintable():
        raise ValueError(_MAILBOX_FORM)
    return Mailbox(found.display_name, address)


@lru_cache(maxsize=1024)
def _mailboxes(value: str) -> str:
    plain = _PLAIN_MAILBOX.fullmatch(value)
    if plain is not None and "=?" not in value and _fits(plain[1] or plain[2]):
        # Most values match this. The parser would need 0.3 ms.
        return value
    parts = []
    for group in _groups(value, _MAILBOXES_FORM):
        inside = ", ".join(_mailbox_text(found, value) for found in group.addresses)
        parts.append(inside if group.display_name is None else f"{_phrase(group.display_name)}: {inside};")
    return ", ".join(parts)


def _uris(value: str) -> str:
    if _URIS.fullmatch(value) is None:
        raise ValueError(_URIS_FORM)
    return value


def _uris_or_no(value: str) -> str:
    # RFC 2369 section 3.4: `NO` is the value of a list that takes no mail.
    return value if _NO.fullmatch(value) else _uris(value)


def _ids(value: str) -> str:
    if _IDS.fullmatch(value) is None:
        raise ValueError(_IDS_FORM)
    return value


@lru_cache(maxsize=1024)
def _list_id(value: str) -> str:
    name, _, rest = value.rpartition("<")
    id_, closed, after = rest.partition(">")
    if not closed or after.strip(" \t") or _LIST_ID.fullmatch(id_) is None or _ENCODED_WORD.search(id_):
        raise ValueError(_LIST_ID_FORM)
    if not name.strip(" \t"):
        return f"<{id_}>"
    return f"{_phrase(_phrase_text(name, _LIST_ID_FORM))} <{id_}>".lstrip(" ")


@lru_cache(maxsize=1024)
def _keywords(value: str) -> str:
    if _KEYWORDS.fullmatch(value) is None:
        raise ValueError(_KEYWORDS_FORM)
    parts = [_keyword(part.strip(" ")) for part in _ONE_KEYWORD.findall(value)]
    return ", ".join(parts)


def _keyword(value: str) -> str:
    if _BARE_PHRASE.fullmatch(value) and "=?" not in value:
        # Most values match this. The parser would need 0.3 ms.
        return _phrase(value)
    name = _phrase_text(value, _KEYWORDS_FORM)
    if not name:
        raise ValueError(_KEYWORDS_FORM)
    return _phrase(name)


def _phrase_text(phrase: str, form: str) -> str:
    """Return the decoded text of a phrase, parsed as the display name of a mailbox."""
    try:
        return mailbox(f"{phrase} <id@list>").name
    except ValueError:
        raise ValueError(form) from None


def _tokens(value: str) -> str:
    if not value.isascii() or BREAKS.search(value) or _ENCODED_WORD.search(value):
        raise ValueError(_TOKENS_FORM)
    return value


def _groups(value: str, form: str) -> tuple[Group, ...]:
    """Return the groups of an address list. A single mailbox is a group without a name."""
    if BREAKS.search(value):
        raise ValueError(form)
    try:
        field = _parser("Reply-To", _ADJACENT_WORDS.sub(_join_words, value))
    except Exception:
        # On some malformed values the parser raises other errors: IndexError, RecursionError and more.
        raise ValueError(form) from None
    assert isinstance(field, AddressHeader)
    names = [found.display_name for found in (*field.groups, *field.addresses)]
    if (
        not field.addresses
        or not all(isinstance(defect, _TOLERATED) for defect in field.defects)
        or any(name and BREAKS.search(name) for name in names)
    ):
        raise ValueError(form)
    return field.groups


def _join_words(words: re.Match[str]) -> str:
    """Return adjacent encoded words as one word.

    The white space between two of them is no part of the text (RFC 2047 section 6.2), but the parser of
    Python 3.11 keeps it.
    """
    try:
        text = str(make_header(decode_header(words[0])))
    except (HeaderParseError, LookupError, UnicodeError):
        return words[0]
    return Header(text, "utf-8", maxlinelen=10_000).encode(linesep="")


def _mailbox_text(found: Address, value: str) -> str:
    address = _addr_spec(found, value, _MAILBOXES_FORM)
    if not address.isascii():
        # The mail would need SMTPUTF8, and so would every answer to this address.
        raise ValueError("has an address that is not ASCII before its @")
    return f"{_phrase(found.display_name)} <{address}>" if found.display_name else address


def _addr_spec(found: Address, value: str, form: str) -> str:
    """Return an address with its domain in A-labels."""
    spec, domain = found.addr_spec, found.domain
    # RFC 2047 section 5 (3) forbids encoded words in an address, but the parser decodes them there too.
    if not found.username or ("=?" in value and spec not in value):
        raise ValueError(form)
    if not domain.isascii():
        try:
            domain = idna.encode(domain, uts46=True, std3_rules=True).decode()
        except idna.IDNAError:
            raise ValueError(form) from None
        spec = f"{spec[: -len(found.domain)]}{domain}"
    if not _fits(spec):
        raise ValueError(ADDRESS_LIMITS)
    if _DOMAIN.fullmatch(domain) is None:
        raise ValueError(form)
    return spec


def _fits(spec: str) -> bool:
    local, _, domain = spec.rpartition("@")
    return len(local.encode()) <= 64 and len(spec.encode()) <= 254 and max(map(len, domain.split("."))) <= 63


def _phrase(name: str) -> str:
    if not name.isascii() or _ENCODED_WORD.search(name):
        return Header(name, "utf-8", maxlinelen=_WORD_LENGTH).encode(linesep="")
    if not name or _PLAIN_PHRASE.fullmatch(name):
        return name
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'


_CLASSES: Mapping[str, Callable[[str], str]] = {
    **dict.fromkeys(
        (
            *("reply-to", "mail-reply-to", "mail-followup-to", "errors-to"),
            *("disposition-notification-to", "return-receipt-to", "author", "original-from"),
        ),
        _mailboxes,
    ),
    **dict.fromkeys(
        (
            *("list-archive", "list-help", "list-owner", "list-subscribe", "list-unsubscribe"),
            "archived-at",
        ),
        _uris,
    ),
    "list-post": _uris_or_no,
    **dict.fromkeys(("in-reply-to", "references", "supersedes", "obsoletes", "original-message-id"), _ids),
    "list-id": _list_id,
    "keywords": _keywords,
    **dict.fromkeys(
        (
            *("auto-submitted", "precedence", "importance", "priority", "sensitivity", "x-priority"),
            *("x-msmail-priority", "x-auto-response-suppress", "list-unsubscribe-post", "feedback-id"),
            *("disposition-notification-options", "accept-language", "mt-priority", "tls-required"),
            *("expires", "expiry-date", "reply-by", "deferred-delivery", "require-recipient-valid-since"),
        ),
        _tokens,
    ),
}
