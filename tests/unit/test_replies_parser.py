"""``ReplyParser``: any split of the stream gives the same replies, and readable parts count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sender.replies import Reply
from services.sender.reply_parser import GarbageError, ReplyParser

TEXT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp", "Zs"]), max_size=40)
REPLIES = st.lists(
    st.builds(Reply, st.integers(200, 599), st.lists(TEXT, min_size=1, max_size=5).map(tuple)), max_size=8
)


def connection(replies: list[Reply]) -> bytes:
    out = b""
    for code, lines in replies:
        for text in lines[:-1]:
            out += f"{code}-{text}\r\n".encode()
        out += f"{code} {lines[-1]}\r\n".encode()
    return out


@given(REPLIES, st.lists(st.integers(1, 20), min_size=1))
def test_any_cut_of_the_stream_gives_the_same_replies(replies: list[Reply], cuts: list[int]) -> None:
    data, parser, got, turn = connection(replies), ReplyParser(), [], 0
    while data:
        size = cuts[turn % len(cuts)]
        got += parser.feed(data[:size])
        data, turn = data[size:], turn + 1
    assert got == replies
    assert parser.empty


def test_a_code_alone_is_a_reply() -> None:
    assert ReplyParser().feed(b"250\r\n") == [Reply(250, ("",))]


def test_unprintable_characters_are_replaced() -> None:
    assert ReplyParser().feed(b"550 a\tb\x1b[2Jc\xff\r\n") == [Reply(550, ("a b?[2Jc\ufffd",))]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"250 ok\n", ["250 ok"]),
        (b"250-a\n250 b\n250 c\r\n", ["250 a b", "250 c"]),
        (b"\r\n\n250 ok\r\n\r\n \r\n", ["250 ok"]),
        (b"250-a\r\n\r\n250 b\r\n", ["250 a b"]),
        (b"250 o\rk\r\n", ["250 o?k"]),
        (b"250\tok\r\n", ["250 ok"]),
        (b"250_ok\r\n", ["250 _ok"]),
        (b" 250 ok\r\n", ["250 ok"]),
        (b"250-a\r\nlost its code\r\n250 b\r\n", ["250 a lost its code b"]),
        # The last line decides; the others are shown too.
        (b"250-a\r\n251 b\r\n", ["251 b 250-a"]),
        (b"250-a\r\n250-b\r\n550 c\r\n", ["550 c 250-a 250-b"]),
        (b"220-mail.example.org\r\n521 5.7.1 blocked\r\n", ["521 5.7.1 blocked 220-mail.example.org"]),
        # Cut, not refused.
        (b"250 " + b"x" * 3000 + b"\r\n", ["250 " + "x" * 2044]),
        (b"250-x\r\n" * 200 + b"550 y\r\n", ["550 y" + " 250-x" * 127]),
    ],
)
def test_a_lenient_parser_reads_these_replies(data: bytes, expected: list[str]) -> None:
    parser = ReplyParser()
    assert [str(reply) for reply in parser.feed(data)] == expected
    assert parser.empty
    # Byte by byte the result is the same.
    parser, got = ReplyParser(), []
    for byte in data:
        got += parser.feed(bytes([byte]))
    assert [str(reply) for reply in got] == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"250 queued", "250 queued"),
        (b"250", "250"),
        (b"250-queued\r\n", "250 queued"),
        (b"250-queued\r\n25", "250 queued 25"),
        (b"250-queued\r\n550 no", "550 no 250-queued"),
        (b"25", "None"),
        (b"hello", "None"),
        (b"2500", "None"),
        (b"\r\n", "None"),
    ],
)
def test_the_readable_part_of_an_unfinished_reply(data: bytes, expected: str) -> None:
    parser = ReplyParser()
    assert parser.feed(data) == []
    assert str(parser.unfinished) == expected


def test_a_lenient_parser_takes_lines_without_a_code_into_the_next_reply() -> None:
    parser = ReplyParser()
    parser.lenient = 2
    assert [str(reply) for reply in parser.feed(b"hello\r\n250 ok\r\n")] == ["250 hello ok"]
    assert parser.feed(b"hello\r\n") == []
    assert parser.unfinished is None
    assert parser.unparsed == "hello"


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n",
        b"25\r\n",
        b"2500 ok\r\n",
        b"150 ok\r\n",
        b"600 ok\r\n",
        b"-50 ok\r\n",
        "²50 ok\r\n".encode(),
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\x16\x03\x01\x02\x00\r\n",
        b"250 " + b"x" * 200_000,
        (b"250-" + b"x" * 1000 + b"\r\n") * 200,
    ],
)
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(GarbageError):
        ReplyParser().feed(data)


def test_empty_is_false_while_a_reply_is_unfinished() -> None:
    parser = ReplyParser()
    assert parser.empty
    parser.feed(b"250-a\r\n")
    assert not parser.empty
    parser.feed(b"250 b")
    assert not parser.empty
    assert parser.feed(b"\r\n") == [Reply(250, ("a", "b"))]
    assert parser.empty


@given(st.binary(max_size=300))
def test_any_bytes_give_replies_or_garbage(data: bytes) -> None:
    try:
        replies = ReplyParser().feed(data)
    except GarbageError:
        return
    assert all(200 <= r.code <= 599 for r in replies)
