"""AUTH: the lines that the client sends, and when it may send a secret."""

import base64
import ssl

import pytest

from services.sender.masking import Mask
from services.sender.replies import Reply
from services.sender.smtp_auth import (
    UnsupportedAuthError,
    challenge_text,
    exchange,
    may_send_secret,
    mechanisms,
)
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
def test_a_secret_goes_to_a_verified_peer_or_in_clear_without_tls(tls: Tls) -> None:
    assert may_send_secret(tls, ssl.create_default_context())
    assert not may_send_secret(tls, unverified())
    assert not may_send_secret(tls, unnamed())
    assert may_send_secret(tls, None) is (tls is Tls.NONE)


@pytest.mark.parametrize("tls", [Tls.IMPLICIT, Tls.STARTTLS, Tls.OPPORTUNISTIC])
def test_credentials_go_to_verified_peers_only(tls: Tls) -> None:
    relay = Relay("mail.example.org", 587, tls, Credentials("ann", "pw"))
    assert may_send_secret(tls, relay.tls_context())


@pytest.mark.parametrize(
    ("offered", "mechanism", "expected"),
    [
        ({"PLAIN", "LOGIN"}, None, ["PLAIN", "LOGIN"]),
        ({"LOGIN", "CRAM-MD5"}, None, ["LOGIN"]),
        ({"PLAIN", "LOGIN"}, "login", ["LOGIN"]),
        ({"PLAIN", "XOAUTH2"}, "XOAUTH2", ["XOAUTH2"]),
        ({"PLAIN", "XOAUTH2"}, "xoauth2", ["XOAUTH2"]),
    ],
)
def test_which_mechanisms(offered: set[str], mechanism: str | None, expected: list[str]) -> None:
    assert mechanisms(Credentials("ann", "pw", mechanism), offered) == expected


@pytest.mark.parametrize(
    ("offered", "mechanism", "says"),
    [
        (set(), None, "AUTH not offered"),
        ({"XOAUTH2"}, None, "offers AUTH XOAUTH2, not PLAIN or LOGIN"),
        ({"PLAIN"}, "LOGIN", "offers AUTH PLAIN, not LOGIN"),
        ({"CRAM-MD5"}, "CRAM-MD5", "not CRAM-MD5"),
    ],
)
def test_no_mechanism(offered: set[str], mechanism: str | None, says: str) -> None:
    with pytest.raises(UnsupportedAuthError, match=says) as caught:
        mechanisms(Credentials("ann", "pw-s3cret", mechanism), offered)
    assert "s3cret" not in str(caught.value)


def lines(mechanism: str, user: str, secret: str, *challenges: str) -> list[bytes]:
    """Return the lines that the client sends while the server answers each with a 334."""
    exchanged = exchange(mechanism, user, secret)
    sent = [next(exchanged)]
    for challenge in challenges:
        try:
            sent.append(exchanged.send(Reply(334, (challenge,))))
        except StopIteration:
            break
    return sent


def test_every_line_is_one_line() -> None:
    for mechanism in ("PLAIN", "LOGIN", "XOAUTH2"):
        for line in lines(mechanism, "a\r\nRSET", "b\nc" * 40, *[""] * 5):
            assert line.endswith(b"\r\n")
            assert line.count(b"\r") == line.count(b"\n") == 1


def test_plain_follows_rfc_4616_and_repeats_its_response_on_demand() -> None:
    line, again = lines("PLAIN", "zoë", "pässword", *[""] * 5)
    assert base64.b64decode(line.split()[2]) == "\0zoë\0pässword".encode()
    assert again == line.split()[2] + b"\r\n"


def test_xoauth2_repeats_its_token_on_demand_and_asks_for_a_refusals_code() -> None:
    first, empty = lines("XOAUTH2", "ann", "token", "eyJzdGF0dXMiOiI0MDEifQ==")
    assert first.startswith(b"AUTH XOAUTH2 ")
    assert empty == b"\r\n"
    first, again, empty = lines("XOAUTH2", "ann", "token", "", "eyJzdGF0dXMiOiI0MDEifQ==", "")
    assert again == first.split()[2] + b"\r\n"
    assert empty == b"\r\n"


@pytest.mark.parametrize(
    ("challenge", "expected"),
    [("eyJzdGF0dXMiOiI0MDEifQ==", '{"status":"401"}'), ("", ""), ("no base64!", ""), ("/w==", "")],
)
def test_the_readable_text_of_a_challenge(challenge: str, expected: str) -> None:
    assert challenge_text(Reply(334, (challenge,)), Mask()) == expected
