"""The client's side of AUTH: PLAIN (RFC 4616), LOGIN and XOAUTH2. Pure: which lines to send, in which
order."""

import ssl
from base64 import b64encode
from collections.abc import Collection

from services.sender.smtp_relay import Credentials, Tls

__all__ = ["UnsupportedAuthError", "auth_lines", "secret_may_go"]


class UnsupportedAuthError(Exception):
    """The server offers no mechanism that these credentials can use."""


def secret_may_go(tls: Tls, context: ssl.SSLContext | None) -> bool:
    """Whether a secret may be sent over a session: to a verified peer, or in clear if TLS is switched off.

    Without this, whoever strips STARTTLS from an opportunistic session, or answers it with a certificate of
    their own, is given the password.

    Args:
        tls: the relay's mode.
        context: what the session was encrypted with; None where it is in clear.
    """
    if context is None:
        return tls is Tls.NONE
    return context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname


def auth_lines(credentials: Credentials, offered: Collection[str]) -> list[bytes]:
    """The lines to send, each after a 334 to the one before it. They hold the secret: never log them.

    Args:
        offered: the mechanisms that EHLO named, in capitals.

    Raises:
        UnsupportedAuthError: none of them can be used.
    """
    wanted = [credentials.mechanism.upper()] if credentials.mechanism else ["PLAIN", "LOGIN"]
    mechanism = next((name for name in wanted if name in offered), None)
    if mechanism is None or mechanism not in _LINES:
        raise UnsupportedAuthError(
            f"the relay offers AUTH {' '.join(sorted(offered)) or 'not at all'}, not {' or '.join(wanted)}"
        )
    return _LINES[mechanism](credentials.user, credentials.secret)


def _plain(user: str, secret: str) -> list[bytes]:
    return [b"AUTH PLAIN " + b64encode(f"\0{user}\0{secret}".encode()) + b"\r\n"]


def _login(user: str, secret: str) -> list[bytes]:
    return [b"AUTH LOGIN\r\n", b64encode(user.encode()) + b"\r\n", b64encode(secret.encode()) + b"\r\n"]


def _xoauth2(user: str, secret: str) -> list[bytes]:
    # A refusal comes as a 334 with the reason; the empty line asks for the 535 itself.
    token = b64encode(f"user={user}\1auth=Bearer {secret}\1\1".encode())
    return [b"AUTH XOAUTH2 " + token + b"\r\n", b"\r\n"]


_LINES = {"PLAIN": _plain, "LOGIN": _login, "XOAUTH2": _xoauth2}
