"""AUTH: which lines are sent, and when a secret may go at all."""

import base64

import pytest

from services.sender.smtp_auth import UnsupportedAuthError, auth_lines, secret_may_go
from services.sender.smtp_relay import Credentials, Tls


@pytest.mark.parametrize(
    ("tls", "encrypted", "peer", "may"),
    [
        (Tls.STARTTLS, True, "192.0.2.1", True),
        (Tls.IMPLICIT, True, "192.0.2.1", True),
        (Tls.OPPORTUNISTIC, True, "192.0.2.1", True),
        (Tls.OPPORTUNISTIC, False, "192.0.2.1", False),
        (Tls.OPPORTUNISTIC, False, "2001:db8::1", False),
        (Tls.OPPORTUNISTIC, False, "fe80::1%eth0", False),
        (Tls.OPPORTUNISTIC, False, "127.0.0.1", True),
        (Tls.OPPORTUNISTIC, False, "::1", True),
        (Tls.NONE, False, "192.0.2.1", True),
    ],
)
def test_a_secret_goes_in_clear_only_to_this_machine_or_on_demand(
    tls: Tls, encrypted: bool, peer: str, may: bool
) -> None:
    assert secret_may_go(tls, encrypted, peer) is may


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
