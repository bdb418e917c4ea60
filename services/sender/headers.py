"""Header fields of a mail: folding, encoded words, addresses (RFC 5322, 2047, 6532).

Pure: strings in, one whole field out as text, with its CRLF. A value that would break out of its field is
refused here too, whatever the caller has checked, since this is the last place that sees it.
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

# RFC 2047 §5 (3): these alone stand for themselves in a phrase, the strictest of the three places.
_PLAIN_IN_Q = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+-/")
_Q = [chr(b) if b in _PLAIN_IN_Q else "_" if b == 0x20 else f"={b:02X}" for b in range(256)]


def address(value: str) -> str:
    """Return ``value`` if it is an addr-spec that may stand in a header and an SMTP command as it is.

    The domain must be in A-label form or a literal; the local part may hold UTF-8 (RFC 6531).

    Raises:
        ValueError: anything else, quoted local parts among it.
    """
    if not _ADDRESS.fullmatch(value) or not value.isprintable():
        raise ValueError(f"not a mail address in A-label form: {value!r}")
    return value


def unstructured(name: str, value: str) -> str:
    """A field of free text (Subject, Comments): folded, and encoded where the text needs it.

    Raises:
        ValueError: a malformed name, or CR, LF or NUL in the value.
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
    """A field whose value is ASCII as it is to be sent (List-Unsubscribe, References); folded at white space.

    Raises:
        ValueError: a malformed name, a value that is not ASCII, has control characters, or cannot be folded
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
    """An address field with one mailbox: ``From: "Shop, Inc." <shop@example.org>``.

    Cached, since a service writes under few names.

    Raises:
        ValueError: a malformed address, or CR, LF or NUL in the name.
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
    """Lines of ``most`` where white space allows; it opens the next line, so unfolding gives it back."""
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
    """Encoded words, one a line: white space between two of them is not part of the text (RFC 2047 §6.2)."""
    data = value.encode()
    quoted = "".join(map(_Q.__getitem__, data))
    as_base64 = len(quoted) > (len(data) + 2) // 3 * 4
    lines: list[str] = []
    lead = prefix
    if len(prefix) > _LINE // 2:
        lines.append(prefix.rstrip(" "))
        lead = " "
    room = min(_ENCODED_LINE - len(lead), _ENCODED_WORD) - _WRAPPER
    pos = 0
    while pos < (len(data) if as_base64 else len(quoted)):
        if as_base64:
            cut = _cut_base64(data, pos, room)
            word = b2a_base64(data[pos:cut], newline=False).decode()
            lines.append(f"{lead}=?utf-8?b?{word}?=")
        else:
            cut = _cut_quoted(quoted, pos, room)
            lines.append(f"{lead}=?utf-8?q?{quoted[pos:cut]}?=")
        pos, lead, room = cut, " ", _ENCODED_WORD - _WRAPPER
    return lines


def _cut_base64(data: bytes, pos: int, room: int) -> int:
    """The end of the longest run of whole characters whose base64 fits (RFC 2047 §5: none is split)."""
    cut = pos + room // 4 * 3
    if cut >= len(data):
        return len(data)
    while data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _cut_quoted(quoted: str, pos: int, room: int) -> int:
    """The same for Q: neither an ``=XX`` nor a character of several of them is split."""
    cut = pos + room
    if cut >= len(quoted):
        return len(quoted)
    if "=" in quoted[cut - 2 : cut]:
        cut = quoted.rindex("=", 0, cut)
    while quoted[cut] == "=" and quoted[cut + 1] in "89AB":
        cut -= 3
    return cut
