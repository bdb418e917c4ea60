"""The keys of page and resume tokens, by which a client can send back only what it was given."""

from __future__ import annotations

import hmac
import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from hashlib import scrypt

from sqlalchemy import URL

__all__ = ["MAC_LENGTH", "TokenKeys", "token_keys"]

# 120 bits, in base64 without padding.
_MAC_SIZE = 15
MAC_LENGTH = 20
"""Characters of a MAC."""
_KEY = re.compile(r"[!-~]{32,}")
# Someone who has a token can try passwords against its key. Each attempt takes 16 MiB and some 50 ms.
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 1 << 14, 8, 1


class TokenKeys:
    """Signs with the first of these keys, and accepts what any of them has signed. Pure."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = tuple(keys)

    def sign(self, kind: bytes, digest: bytes, text: str) -> str:
        """Return the MAC of `text`: 20 characters of HMAC-SHA256 in base64.

        `kind` is one byte, which tells page tokens from resume tokens. `digest` has 16 bytes, which identify
        the tenant and what the token selects.
        """
        return _mac(self._keys[0], kind, digest, text)

    def has_signed(self, mac: str, kind: bytes, digest: bytes, text: str) -> bool:
        """Return whether `sign` made this MAC. Any strings may be passed."""
        if not mac.isascii() or not text.isascii():
            return False
        return any(hmac.compare_digest(_mac(key, kind, digest, text), mac) for key in self._keys)


def token_keys(given: str, database: URL) -> TokenKeys:
    """Return the keys of POSTROAD_TOKEN_KEYS, or without any one derived from the database's password.

    All replicas have that password, and keep it over a restart. Without a password the key is random.

    Raises ValueError for a key that is too short. The text never contains a key.
    """
    if given:
        keys = given.split(",")
        for number, key in enumerate(keys, start=1):
            if _KEY.fullmatch(key) is None:
                raise ValueError(f"key {number} is not 32 or more visible ASCII characters")
        return TokenKeys([key.encode() for key in keys])
    if not database.password:
        return TokenKeys([secrets.token_bytes(32)])
    password, salt = str(database.password).encode(), b"postroad page and resume tokens"
    return TokenKeys([scrypt(password, salt=salt, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P, dklen=32)])


def _mac(key: bytes, kind: bytes, digest: bytes, text: str) -> str:
    mac = hmac.digest(key, kind + digest + text.encode(), "sha256")[:_MAC_SIZE]
    return urlsafe_b64encode(mac).decode()
