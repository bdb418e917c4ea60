"""Replies: what they mean."""

import pytest

from services.sender.replies import Reply


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
