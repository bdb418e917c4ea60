"""AUTH: which lines are sent, and when a secret may go at all."""

import base64
import ssl

import pytest

from services.sender.smtp_auth import UnsupportedAuthError, auth_lines, secret_may_go
from services.sender.smtp_relay import Credentials, Relay, Tls


def unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def unnamed() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    return context


@pytest.mark.parametrize("tls", list(Tls))
def test_a_secret_goes_to_a_verified_peer_or_in_clear_on_demand(tls: Tls) -> None:
    assert secret_may_go(tls, ssl.create_default_context())
    assert not secret_may_go(tls, unverified())
    assert not secret_may_go(tls, unnamed())
    assert secret_may_go(tls, None) is (tls is Tls.NONE)


@pytest.mark.parametrize("tls", [Tls.IMPLICIT, Tls.STARTTLS, Tls.OPPORTUNISTIC])
def test_whoever_is_given_credentials_is_verified(tls: Tls) -> None:
    relay = Relay("mail.example.org", 587, tls, Credentials("ann", "pw"))
    assert secret_may_go(tls, relay.tls_context())


@pytest.mark.parametrize(
    ("offered", "mechanism", "first"),
    [
        ({"PLAIN", "LOGIN"}, None, b"AUTH PLAIN "),
        ({"LOGIN"}, None, b"AUTH LOGIN\r\n"),
        ({"PLAIN", "LOGIN"}, "login", b"AUTH LOGIN\r\n"),
        ({"PLAIN", "XOAUTH2"}, "XOAUTH2", b"AUTH XOAUTH2 "),
    ],
)
def test_which_mechanism(offered: set[str], mechanism: str | None, first: bytes) -> None:
    assert auth_lines(Credentials("ann", "pw", mechanism), offered)[0].startswith(first)


@pytest.mark.parametrize(
    ("offered", "mechanism"),
    [(set(), None), ({"XOAUTH2"}, None), ({"PLAIN"}, "LOGIN"), ({"CRAM-MD5"}, "CRAM-MD5")],
)
def test_no_mechanism(offered: set[str], mechanism: str | None) -> None:
    with pytest.raises(UnsupportedAuthError) as caught:
        auth_lines(Credentials("ann", "pw-s3cret", mechanism), offered)
    assert "s3cret" not in str(caught.value)


def test_every_line_is_one_line() -> None:
    for mechanism in ("PLAIN", "LOGIN", "XOAUTH2"):
        for line in auth_lines(Credentials("a\r\nRSET", "b\nc" * 40, mechanism), {mechanism}):
            assert line.endswith(b"\r\n")
            assert line.count(b"\r") == line.count(b"\n") == 1


def test_plain_is_what_rfc_4616_says() -> None:
    (line,) = auth_lines(Credentials("zoë", "pässword"), {"PLAIN"})
    assert base64.b64decode(line.split()[2]) == "\0zoë\0pässword".encode()
