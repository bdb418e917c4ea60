"""Replies: what they mean, what counts as ours, how long a server asks to wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sender.replies import Phase, Reply, is_ours, retry_hint


def reply(text: str) -> Reply:
    return Reply(int(text[:3]), (text[4:],))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, "ok") for code in (220, 250, 252)),
        *((code, "intermediate") for code in (334, 354)),
        *((code, "transient") for code in (421, 450, 499)),
        *((code, "permanent") for code in (500, 554, 571)),
    ],
)
def test_the_first_digit_is_the_class(code: int, kind: str) -> None:
    classes = ("ok", "intermediate", "transient", "permanent")
    assert [c for c in classes if getattr(Reply(code, ("",)), c)] == [kind]


def test_the_basic_code_wins_over_the_enhanced_one() -> None:
    assert reply("550 4.2.1 mailbox disabled").permanent
    assert reply("450 5.1.1 unknown user").transient


@pytest.mark.parametrize(
    ("text", "enhanced"),
    [
        ("550 5.1.1 no such user", "5.1.1"),
        ("250 2.0.0", "2.0.0"),
        ("250 OK", None),
        ("250 2.0.0.1 version", None),
        ("550 3.1.1 x", None),
        ("550 5.1.1234 x", None),
        ("354 ", None),
    ],
)
def test_enhanced_code(text: str, enhanced: str | None) -> None:
    assert reply(text).enhanced == enhanced


def test_shown_with_the_code_first() -> None:
    assert str(Reply(550, ("5.1.1 no such", "user"))) == "550 5.1.1 no such user"
    assert str(Reply(250, ("",))) == "250"


def test_only_421_closes() -> None:
    assert [c for c in range(200, 600) if Reply(c, ("",)).closes] == [421]


@pytest.mark.parametrize("phase", [Phase.CONNECT, Phase.TLS, Phase.AUTH])
@pytest.mark.parametrize("text", ["421 busy", "454 TLS not available", "535 bad password", "554 go away"])
def test_before_mail_every_refusal_is_ours(phase: Phase, text: str) -> None:
    assert is_ours(phase, reply(text))


@pytest.mark.parametrize("phase", [Phase.ENVELOPE, Phase.DATA, Phase.AFTER_DOT])
@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("530 5.7.0 Must issue a STARTTLS command first", True),
        ("530 5.7.0 Authentication required", True),
        ("535 5.7.8 Credentials invalid", True),
        ("421 4.3.2 shutting down", False),
        ("451 4.7.1 greylisted", False),
        ("454 4.7.1 Relay access denied", False),
        ("550 5.1.1 no such user", False),
        ("554 5.7.1 rejected", False),
    ],
)
def test_from_mail_on_only_a_demand_for_auth_is_ours(phase: Phase, text: str, ours: bool) -> None:
    assert is_ours(phase, reply(text)) is ours


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("451 4.7.1 Greylisted, retry in 300 seconds", 300),
        ("451 4.7.1 greylisted, try again in 5 minutes", 300),
        ("450 4.2.0 Greylisting in action, please come back in 00:05:00", 300),
        ("450 4.7.1 <a@b.example>: Greylisted; retry=00:05:00", 300),
        ("451 Greylisted for 5 minutes (code 17)", 300),
        ("451 4.7.1 Greylisted for 1h 30m", 5400),
        ("451 4.7.1 Please try again after 1 minute and 30 seconds", 90),
        ("450 please wait 10 mins", 600),
        ("450 try again in 01:30", 90),
        ("450 retry in 0 seconds", 1),
        ("450 retry in 9999999 hours", 86_400),
        ("421 4.7.0 try again in 2h", 7200),
        ("450 4.2.0 Greylisted, see http://postgrey.example/help/300.html", None),
        ("450 4.2.0 try again later", None),
        ("452 4.2.2 mailbox over quota by 300 seconds of mail", None),
        ("450 retry 12:30:45:10", None),
        ("451 try again, 10.0.0.300 sent 5 messages", None),
        ("550 5.7.1 try again in 5 minutes", None),
        ("250 retry in 5 minutes", None),
    ],
)
def test_retry_hint(text: str, seconds: float | None) -> None:
    assert retry_hint(reply(text)) == seconds


def test_retry_hint_reads_over_several_lines() -> None:
    assert retry_hint(Reply(451, ("4.7.1 Greylisted,", "retry in 60 seconds"))) == 60


@given(st.integers(400, 499), st.text(max_size=2500))
def test_retry_hint_is_bounded_whatever_the_server_says(code: int, text: str) -> None:
    hint = retry_hint(Reply(code, (text,)), at_most=3600)
    assert hint is None or 1 <= hint <= 3600


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    "text", ["retry" * 400, "retry " + "1h " * 400 + "x", "retry 1" + "0" * 2000, "wait:" * 500]
)
def test_retry_hint_is_quick_on_hostile_text(text: str) -> None:
    for _ in range(100):
        retry_hint(Reply(450, (text,)))
