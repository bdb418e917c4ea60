"""The mail as bytes, built from a template (RFC 5322, 2045, 2046, 2047, 6532).

Pure and deterministic: the same arguments give the same bytes, so an attempt that is repeated after a case
in doubt is the same mail. The standard library's EmailMessage gives the same round trip at a hundred times
the cost.

A body goes as 7bit when it is plain ASCII in short lines and quoted-printable otherwise, never as 8bit: a
message is built before it is known whether the relay and each host behind it take 8BITMIME, and a host that
has to convert it on the way breaks signatures (RFC 6376 §5.3). So a message is pure ASCII unless an address
is not.
"""

import re
from binascii import b2a_qp
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from zlib import crc32

from services.common.header_fields import written
from services.sender.headers import address, mailbox, structured, unstructured

__all__ = ["OWN_HEADERS", "build"]

#: Fields that ``build`` writes itself, in lower case; ``headers`` may not name them.
OWN_HEADERS = frozenset(
    {
        "content-transfer-encoding",
        "content-type",
        "date",
        "from",
        "message-id",
        "mime-version",
        "subject",
        "to",
    }
)

_MAX_LINE = 998  # RFC 5322 §2.1.1, without the CRLF
_YEAR_10000 = 253_402_300_800  # RFC 5322 §3.3 writes a year with four digits
_MESSAGE_ID = re.compile(r"<[!-;=?-~]{1,480}@[!-;=?-~]{1,480}>")
# NUL may not stand in 7bit at all (RFC 2045 §2.7); the other controls pass more relays encoded.
_CONTROLS = bytes(b for b in (*range(32), 127) if b not in b"\t\r\n")


def build(
    *,
    message_id: str,
    from_addr: str,
    to_addr: str,
    subject: str,
    date: float,
    text: str | None = None,
    html: str | None = None,
    from_name: str = "",
    reply_to: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """Build one mail to one recipient, with CRLF line ends and no dot-stuffing.

    Args:
        message_id: with its angle brackets, ``<task id@domain>``.
        from_addr, to_addr, reply_to: addr-specs, domain in A-label form, local part ASCII or UTF-8.
        subject: any text without CR, LF, NUL; what is not printable ASCII is sent in encoded words.
        date: seconds since the epoch, written in UTC.
        text, html: the bodies, any text; CR, LF and CRLF all count as a line end, and a body that is not
            empty is given a last one. Both together make a multipart/alternative.
        from_name: the display name beside ``from_addr``.
        headers: more fields. ASCII values are folded but never encoded; others are encoded where their class
            has text.

    Raises:
        ValueError: no body, a malformed address, id, date or header, a header of ``OWN_HEADERS``, or text
            that UTF-8 cannot carry (a lone surrogate). Such a task can never be sent.
    """
    if not _MESSAGE_ID.fullmatch(message_id):
        raise ValueError(f"not a message id: {message_id!r}")
    if not 0 <= date < _YEAR_10000:
        raise ValueError(f"not a date: {date}")
    head = (
        f"Date: {_date(int(date))}\r\n"
        f"{mailbox('From', from_name, from_addr)}"
        f"To: {address(to_addr)}\r\n"
        f"{unstructured('Subject', subject)}"
        f"Message-ID: {message_id}\r\n"
    )
    if reply_to:
        head += f"Reply-To: {address(reply_to)}\r\n"
    if headers:
        head += _more(headers, reply_to is not None)
    head += "MIME-Version: 1.0\r\n"
    if html is None:
        if text is None:
            raise ValueError("a mail needs a text or an HTML body")
        return head.encode() + _part("plain", text)
    if text is None:
        return head.encode() + _part("html", html)
    parts = _part("plain", text), _part("html", html)
    boundary = _boundary(message_id, parts)
    return (
        head.encode()
        + b'Content-Type: multipart/alternative; boundary="%b"\r\n' % boundary
        + b"\r\n--%b\r\n%b" % (boundary, parts[0])
        + b"\r\n--%b\r\n%b" % (boundary, parts[1])
        + b"\r\n--%b--\r\n" % boundary
    )


def _part(subtype: str, text: str) -> bytes:
    """One text part: its two fields, the empty line, its body."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text and text[-1] != "\n":
        text += "\n"
    body = text.replace("\n", "\r\n").encode()
    encoding = b"7bit"
    if not body.isascii() or len(body.translate(None, _CONTROLS)) != len(body) or _long_lines(body):
        encoding = b"quoted-printable"
        body = b2a_qp(body)
    return b"Content-Type: text/%b; charset=utf-8\r\nContent-Transfer-Encoding: %b\r\n\r\n%b" % (
        subtype.encode(),
        encoding,
        body,
    )


def _long_lines(body: bytes) -> bool:
    return len(body) > _MAX_LINE and max(map(len, body.split(b"\r\n"))) > _MAX_LINE


def _boundary(message_id: str, parts: tuple[bytes, bytes]) -> bytes:
    """A boundary that no part holds: ``=_`` cannot come out of quoted-printable, and 7bit parts are searched.

    It differs from mail to mail, so that one mail may be attached to another as it is (RFC 2046 §5.1.1).
    """
    stem = crc32(message_id.encode())
    number = 0
    while True:
        boundary = b"=_%08x.%d" % (stem, number)
        if not any(boundary in part for part in parts):
            return boundary
        number += 1


def _more(headers: Mapping[str, str], has_reply_to: bool) -> str:
    fields = []
    for name, value in headers.items():
        lower = name.lower()
        if lower in OWN_HEADERS or (has_reply_to and lower == "reply-to"):
            raise ValueError(f"header {name} is written by the sender itself")
        # The api writes known fields in ASCII; an older record has what its client gave.
        shown = value if value.isascii() else _written(name, value)
        fields.append(structured(name, shown) if shown.isascii() else unstructured(name, shown))
    return "".join(fields)


def _written(name: str, value: str) -> str:
    try:
        return written(name, value)
    except ValueError as error:
        raise ValueError(f"header {name}: {error}") from None


@lru_cache(maxsize=256)
def _date(seconds: int) -> str:
    return format_datetime(datetime.fromtimestamp(seconds, UTC))
