"""Masks: no secret is shown, in whatever form a server repeats it."""

import base64
import html
import json
from urllib.parse import quote, quote_plus

import pytest

from services.sender.masking import Mask, reply_codes, without_addresses
from services.sender.reply_parser import ReplyParser
from services.sender.smtp_auth import secret_mask

SECRET = 'p+A/ss=wör d~12"34<567'
RESPONSE = base64.b64encode(f"\0ann\0{SECRET}".encode()).decode()


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        quote(SECRET),
        quote(SECRET, safe="").lower(),
        quote_plus(SECRET),
        json.dumps(SECRET)[1:-1],
        html.escape(SECRET),
        base64.b64encode(SECRET.encode()).decode(),
    ],
)
def test_a_secret_is_masked_in_every_form(form: str) -> None:
    assert Mask(SECRET).text(f"no: <{form}>, {form}") == "no: <***>, ***"


def test_other_texts_stay() -> None:
    assert Mask("").text("535 no") == "535 no"
    assert Mask("****").text("a **** b") == "a *** b"
    assert Mask("250").text("250 ok") == "250 ok"
    assert Mask(SECRET).text("535 p+A is wrong") == "535 p+A is wrong"


@pytest.mark.parametrize("left", [len(RESPONSE), len(RESPONSE) - 3, 12, 8])
def test_a_response_that_the_server_cuts_is_masked_from_its_beginning(left: int) -> None:
    assert (
        secret_mask("ann", SECRET).text(f"500 what: AUTH PLAIN {RESPONSE[:left]}")
        == "500 what: AUTH PLAIN ***"
    )


def test_a_reply_is_masked_before_it_is_cut() -> None:
    for before in range(1980, 2060):
        parser = ReplyParser()
        parser.mask = secret_mask("ann", SECRET)
        [reply] = parser.feed(f"500 {'x' * before} {RESPONSE}\r\n".encode())
        assert RESPONSE[:9] not in str(reply)


def test_an_unfinished_reply_is_masked_too() -> None:
    parser = ReplyParser()
    parser.mask = secret_mask("ann", SECRET)
    parser.feed(f"500-{RESPONSE}\r\n500 {RESPONSE[:-2]}".encode())
    assert parser.unparsed == "500-*** 500 ***"
    assert str(parser.unfinished) == "500 *** ***"


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        ("550 5.1.1 <ada@good.test>: no such user", "550 5.1.1"),
        ("550 user ada is unknown", "550"),
        ("421-4.7.0 ada.b@good.test waits", "421-4.7.0"),
        ("450 4.2.1.9 ada", "450"),
        (
            "the connection was lost, after b'<ada@good.test'",
            "the connection was lost, after b'<***@good.test'",
        ),
        ("5501 ada@good.test", "5501 ***@good.test"),
        ("", ""),
    ],
)
def test_a_log_has_only_the_codes_of_a_reply(reply: str, shown: str) -> None:
    assert reply_codes(reply) == shown


@pytest.mark.parametrize(
    "address",
    [
        "ada@good.test",
        '"a b\\"c"@good.test',
        "SRS0=x=y=d=ada@good.test",
        "ada+40x@good.test",
        "ä.b@good.test",
    ],
)
def test_an_address_has_no_local_part_in_a_log(address: str) -> None:
    assert without_addresses(f"554 <{address}>: relay access denied, {address}") == (
        "554 <***@good.test>: relay access denied, ***@good.test"
    )
