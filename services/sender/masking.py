"""Masks for secrets and addresses: servers repeat in their replies what they were sent. Pure."""

import html
import json
import re
from base64 import b64encode
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

__all__ = ["Mask", "printable", "reply_codes", "without_addresses"]

_MASKED = b"***"
# This many characters of a base64 form identify it, since servers cut long lines.
_KNOWN_BY = 8
# A shorter secret may occur anywhere by chance, also in a reply's code.
_SHORTEST = 4
_MAX_SHOWN = 300
# RFC 3463 section 2.
_CODES = re.compile(r"[2-5][0-9]{2}(?![0-9])(?:[ -][245]\.[0-9]{1,3}\.[0-9]{1,3}(?![.0-9]))?")
# RFC 5321 section 4.1.2: a quoted string, or a dot-string, of which a server may also show a cut form.
_LOCAL_PART = re.compile(r'"(?:[^"\\]|\\.)*"@|[^\s<>()\[\]:;,"@]+@')


def printable(text: str) -> str:
    """Return the start of a text for a log, with spaces for unprintable characters."""
    return "".join(c if c.isprintable() else " " for c in text)[:_MAX_SHOWN].strip()


def reply_codes(reply: str) -> str:
    """Return a reply's codes for a log: `550 5.1.1`.

    Its text often names the recipient, in whatever form the server likes. What is no reply is returned
    without addresses.
    """
    codes = _CODES.match(reply)
    return codes[0] if codes else without_addresses(reply)


def without_addresses(text: str) -> str:
    """Return a text with `***` in place of the local part of each mail address."""
    return _LOCAL_PART.sub("***@", text)


class Mask:
    """Replaces a secret by ``***``: in plain text, base64, and as URLs, forms, JSON and HTML write it.

    `sent` are base64 texts that hold the secret among other things. Mask a text before cutting it: a cut
    secret is not found. Of a secret with less than 4 bytes, only the base64 form is masked.
    """

    __slots__ = ("_pattern",)

    def __init__(self, secret: str = "", sent: Iterable[bytes] = ()) -> None:
        whole = {
            secret,
            quote(secret),
            quote(secret, safe=""),
            quote_plus(secret),
            json.dumps(secret)[1:-1],
            json.dumps(secret, ensure_ascii=False)[1:-1],
            html.escape(secret),
        }
        longest_first = sorted((form.encode() for form in whole), key=len, reverse=True)
        forms = [re.escape(form) for form in longest_first if len(form) >= _SHORTEST]
        forms += [
            re.escape(text[:_KNOWN_BY]) + rb"[A-Za-z0-9+/]*=*"
            for text in (b64encode(secret.encode()), *sent)
            if text
        ]
        self._pattern = re.compile(b"|".join(forms), re.IGNORECASE) if forms else None

    def __call__(self, data: bytes) -> bytes:
        """Return `data` without the secret."""
        return data if self._pattern is None else self._pattern.sub(_MASKED, data)

    def text(self, text: str) -> str:
        """Return `text` without the secret."""
        return self(text.encode("utf-8", "replace")).decode("utf-8", "replace")
