"""The texts that count as a wish for the time of the next attempt, and texts that only look like one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sender.replies import Reply
from services.sender.retry_hints import retry_hint


def reply(text: str) -> Reply:
    return Reply(int(text[:3]), (text[4:],))


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
        # Next to a word for waiting, on either side.
        ("451 4.7.1 Greylisting in effect, please wait at least 300 seconds", 300),
        ("450 Deferred for 2 hours, 5 mins", 7500),
        ("450 4.7.1 wait 00:10:00", 600),
        ("450 4.7.0 [192.0.2.5]: please try again later (in 15m)", 900),
        ("450 4.7.1 Please allow 10 minutes before you try again", 600),
        ("451 4.7.1 delay=300s", 300),
        ("450 4.2.0 <ann@h30m.example>: Recipient address rejected: Greylisted for 60 s", 60),
        # Not next to one.
        ("450 4.7.1 Try again later. At most 100 messages within 1 hour", None),
        ("451 4.3.0 try again; you sent 500 mails in 10 minutes", None),
        ("452 4.2.2 mailbox full since 3 hours", None),
        ("450 fallback of 5 m, country 7 s", None),
        # Ids.
        ("451 4.3.0 Try again later (id=7h-5m3s)", None),
        ("451 4.7.1 try again later 5m.a1b2", None),
        ("450 4.2.0 deferred 4F5h", None),
        ("451 4.7.0 please retry, 3m@mx-30s", None),
        ("421 4.7.0 Try again later, ffacd0b85a97d-3a 20:30 gsmtp", None),
        # Addresses.
        ("450 4.7.1 greylisted [2001:db8::10:30]", None),
        ("450 4.7.1 try again 2001:db8:10:20::1", None),
        ("451 4.7.1 try again, <5m@wait.example>", None),
        ("451 4.7.1 retry for 5m@wait.example", None),
        # URLs.
        ("450 4.7.1 wait: https://wait.example/retry/5m", None),
        ("450 4.7.1 retry in www.example.org/30 s", None),
        # A time of day.
        ("450 4.7.1 try again after 23:30", None),
        ("450 4.7.1 try again at 08:15:00 UTC", None),
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
    "text",
    [
        "retry" * 400,
        "retry " + "1h " * 400 + "x",
        "retry 1" + "0" * 2000,
        "wait:" * 500,
        "1m " * 400,
        "retry in " * 200,
    ],
    ids=range(6),
)
def test_retry_hint_is_quick_on_hostile_text(text: str) -> None:
    for _ in range(100):
        retry_hint(Reply(450, (text,)))
