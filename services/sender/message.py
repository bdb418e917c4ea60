"""The mail as bytes, built from a template (RFC 5322, 2045, 2046, 2047, 6532). Pure.

The same arguments give the same bytes, so a resend after a mail in doubt is the same mail. ADR 27 compares
this writer with the standard library's EmailMessage.

A body is encoded as 7bit if it is plain ASCII in short lines, and as quoted-printable otherwise, never as
8bit. When the sender writes the message, it does not know whether all later hosts take 8BITMIME. A host
that converts the message on its way breaks signatures (RFC 6376 §5.3). So a message is pure ASCII unless an
address is not.
"""

import re
from binascii import b2a_qp
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from zlib import crc32

from services.common.header_fields import canonical
from services.sender.headers import address, mailbox, structured, unstructured

__all__ = ["OWN_HEADERS", "build"]

#: The fields that ``build`` writes itself, in lower case. ``headers`` may not have them.
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
# 7bit may not contain NUL (RFC 2045 §2.7). The other controls pass more relays in an encoded body.
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
        from_addr: an addr-spec, its domain in A-label form, its local part in ASCII or UTF-8.
        to_addr: as ``from_addr``.
        reply_to: as ``from_addr``; None: there is no such field.
        subject: any text without CR, LF, NUL. It is sent in encoded words if it is not printable ASCII.
        date: seconds since the Unix epoch, written in UTC.
        text: the plain body. CR, LF and CRLF each end a line; ``build`` ends the last line if it has no end.
        html: the HTML body, as ``text``. Both together make a multipart/alternative.
        from_name: the display name beside ``from_addr``.
        headers: further fields. ``build`` folds ASCII values and never encodes them. It encodes others where
            their grammar has text.

    Raises:
        ValueError: the task can never be sent. It has no body, an argument is malformed, a header is one of
            ``OWN_HEADERS``, or UTF-8 cannot carry the text (a lone surrogate).
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
    """Return one text part: its two fields, the empty line, its body."""
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
    """Return a boundary that no part contains.

    It differs from mail to mail, so that a mail may be attached to another one unchanged (RFC 2046 §5.1.1).
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
        # The api encodes the fields that it knows; an older record has its client's own text.
        text = value if value.isascii() else _written(name, value)
        fields.append(structured(name, text) if text.isascii() else unstructured(name, text))
    return "".join(fields)


def _written(name: str, value: str) -> str:
    try:
        return canonical(name, value)
    except ValueError as error:
        raise ValueError(f"header {name}: {error}") from None


@lru_cache(maxsize=256)
def _date(seconds: int) -> str:
    return format_datetime(datetime.fromtimestamp(seconds, UTC))
