"""Header fields of a mail: folding, encoded words, addresses (RFC 5322, 2047, 6532).

Pure: each function takes strings and returns one whole field as text, with its CRLF. It refuses a value that
would break out of its field, whatever the caller has checked, since this is the last place that sees it.
"""

import re
from binascii import b2a_base64
from functools import lru_cache

__all__ = ["address", "mailbox", "structured", "unstructured"]

# RFC 5322 §2.1.1: a line holds 998 bytes at most and should hold 78. RFC 2047 §2: 76 on a line with an
# encoded word, and 75 for the word itself.
_MAX_LINE = 998
_LINE = 78
_ENCODED_LINE = 76
_ENCODED_WORD = 75
_WRAPPER = len("=?utf-8?q??=")

_BREAKS = re.compile(r"[\r\n\0]")
_NAME = re.compile(r"[!-9;-~]{1,76}")
_WORDS = re.compile(r"[ \t]*[^ \t]+")
# Atoms (RFC 5322 §3.2.3), with every non-ASCII character of RFC 6532 §3.2 taken as atext.
_ATEXT = r"[^\x00-\x20\x7f\"(),.:;<>@\[\]\\]"
_ADDRESS = re.compile(
    rf"{_ATEXT}+(?:\.{_ATEXT}+)*@(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Za-z:.]+\])"
)
_PHRASE = re.compile(r"[A-Za-z0-9!#$%&'*+/^_`{|}~-]+(?: [A-Za-z0-9!#$%&'*+/^_`{|}~-]+)*")

# RFC 2047 §5 (3): a phrase is the strictest place for Q, and these are its only plain characters.
_PLAIN_IN_Q = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+-/")
_Q = [chr(b) if b in _PLAIN_IN_Q else "_" if b == 0x20 else f"={b:02X}" for b in range(256)]


def address(value: str) -> str:
    """Return ``value`` if it is an addr-spec that a header and an SMTP command can hold as it is.

    The domain must be in A-label form or a literal; the local part may hold UTF-8 (RFC 6531).

    Raises:
        ValueError: for anything else, also for quoted local parts.
    """
    if not _ADDRESS.fullmatch(value) or not value.isprintable():
        raise ValueError(f"not a mail address in A-label form: {value!r}")
    return value


def unstructured(name: str, value: str) -> str:
    """Return a field of free text (Subject, Comments): folded, and encoded if the text requires it.

    Raises:
        ValueError: the name is malformed, or the value has CR, LF or NUL.
    """
    plain = value.isascii() and value.isprintable() and value.strip(" ") == value and "=?" not in value
    prefix = f"{_name(name)}: "
    if plain and len(prefix) + len(value) <= _LINE:
        return f"{prefix}{value}\r\n" if value else f"{name}:\r\n"
    _refuse_breaks(name, value)
    if plain:
        folded = _fold(prefix, value)
        if max(map(len, folded)) <= _LINE:
            return "\r\n".join(folded) + "\r\n"
    lines = _encoded(prefix, value)
    return "\r\n".join(lines) + "\r\n"


def structured(name: str, value: str) -> str:
    """Return a field whose value is sent as it is (List-Unsubscribe, References), folded at white space.

    Raises:
        ValueError: the name is malformed, or the value is not ASCII, has control characters, or cannot be
        folded
            into lines of 998 bytes.
    """
    _refuse_breaks(name, value)
    value = value.strip(" \t")
    if not value.isascii() or not value.replace("\t", " ").isprintable():
        raise ValueError(f"header {name}: only printable ASCII can stand here")
    lines = _fold(f"{_name(name)}: ", value, _ENCODED_LINE if "=?" in value else _LINE)
    if max(map(len, lines)) > _MAX_LINE:
        raise ValueError(f"header {name}: a word too long to fold")
    return "\r\n".join(lines) + "\r\n"


@lru_cache(maxsize=256)
def mailbox(field: str, display_name: str, addr_spec: str) -> str:
    """Return an address field with one mailbox: ``From: "Shop, Inc." <shop@example.org>``.

    Cached, since a service writes under few names.

    Raises:
        ValueError: the address is malformed, or the name has CR, LF or NUL.
    """
    spec = address(addr_spec)
    prefix = f"{_name(field)}: "
    if not display_name:
        return f"{prefix}{spec}\r\n"
    _refuse_breaks(field, display_name)
    name = display_name
    if not (name.isascii() and name.isprintable() and "=?" not in name and len(name) <= 60):
        lines = _encoded(prefix, name)
    elif _PHRASE.fullmatch(name):
        lines = [prefix + name]
    else:
        quoted = name.replace("\\", "\\\\").replace('"', '\\"')
        lines = [f'{prefix}"{quoted}"']
    if len(lines[-1]) + len(spec) + 3 > _ENCODED_LINE:
        return "\r\n".join([*lines, f" <{spec}>"]) + "\r\n"
    return "\r\n".join(lines) + f" <{spec}>\r\n"


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"not a header name: {name!r}")
    return name


def _refuse_breaks(name: str, value: str) -> None:
    if _BREAKS.search(value):
        raise ValueError(f"header {name}: CR, LF and NUL cannot stand in a header")


def _fold(prefix: str, value: str, most: int = _LINE) -> list[str]:
    """Return lines of at most ``most`` characters if white space allows it.

    The white space begins the next line, so unfolding restores the value.
    """
    lines, line = [], prefix
    for word in _WORDS.findall(value):
        if len(line) + len(word) > most and line != prefix:
            lines.append(line)
            line = word
        else:
            line += word
    lines.append(line)
    return lines


def _encoded(prefix: str, value: str) -> list[str]:
    """Return encoded words, one a line: white space between two of them is no part of the text (RFC 2047
    §6.2)."""
    data = value.encode()
    quoted = "".join(map(_Q.__getitem__, data))
    as_base64 = len(quoted) > (len(data) + 2) // 3 * 4
    lines: list[str] = []
    lead = prefix
    if len(prefix) > _LINE // 2:
        lines.append(prefix.rstrip(" "))
        lead = " "
    space = min(_ENCODED_LINE - len(lead), _ENCODED_WORD) - _WRAPPER
    pos = 0
    while pos < (len(data) if as_base64 else len(quoted)):
        if as_base64:
            cut = _cut_base64(data, pos, space)
            word = b2a_base64(data[pos:cut], newline=False).decode()
            lines.append(f"{lead}=?utf-8?b?{word}?=")
        else:
            cut = _cut_quoted(quoted, pos, space)
            lines.append(f"{lead}=?utf-8?q?{quoted[pos:cut]}?=")
        pos, lead, space = cut, " ", _ENCODED_WORD - _WRAPPER
    return lines


def _cut_base64(data: bytes, pos: int, space: int) -> int:
    """Return the end of the longest run of whole characters whose base64 fits (RFC 2047 §5)."""
    cut = pos + space // 4 * 3
    if cut >= len(data):
        return len(data)
    while data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _cut_quoted(quoted: str, pos: int, space: int) -> int:
    """The same for Q: it splits neither an ``=XX`` nor a character of several bytes."""
    cut = pos + space
    if cut >= len(quoted):
        return len(quoted)
    if "=" in quoted[cut - 2 : cut]:
        cut = quoted.rindex("=", 0, cut)
    while quoted[cut] == "=" and quoted[cut + 1] in "89AB":
        cut -= 3
    return cut
