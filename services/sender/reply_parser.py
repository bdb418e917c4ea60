"""Bytes from a mail server become replies, strictly (RFC 5321 §4.2)."""

from functools import lru_cache

from services.sender.replies import Reply

__all__ = ["GarbageError", "ReplyParser"]

# RFC 5321 §4.5.3.1.5 allows 512; servers that quote addresses and URLs exceed it.
_MAX_LINE = 2048
_MAX_LINES = 128


class GarbageError(Exception):
    """What came is not SMTP. Nothing that follows on this connection can be trusted."""

    replies: list[Reply]
    """The whole replies that came before it in the same bytes."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.replies = []


class ReplyParser:
    """Cuts a stream of bytes into replies.

    Strict where leniency would let two sides read the stream differently: each line ends with CRLF, every
    line of a reply carries the same code, and lines and replies are bounded.
    """

    __slots__ = ("_code", "_lines", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._code = 0
        self._lines: list[str] = []

    @property
    def empty(self) -> bool:
        """True when all bytes that were fed have been given back as whole replies."""
        return not self._rest and not self._lines

    def feed(self, data: bytes) -> list[Reply]:
        """Take what was received; return the replies that it completes, oldest first.

        Raises:
            GarbageError: the stream is not a sequence of replies. The parser is then of no further use.
        """
        if self._rest:
            data = self._rest + data
        *lines, self._rest = data.split(b"\r\n")
        replies: list[Reply] = []
        try:
            for line in lines:
                reply, more = _line(line)
                if more or self._lines:
                    whole = self._continued(reply, more)
                    if whole is not None:
                        replies.append(whole)
                else:
                    replies.append(reply)
            if len(self._rest) > _MAX_LINE:
                raise GarbageError("a reply line that does not end")
            if b"\n" in self._rest:
                raise GarbageError(f"a line end that is not CRLF: {_shown(self._rest)}")
        except GarbageError as error:
            error.replies = replies
            raise
        return replies

    def _continued(self, line: Reply, more: bool) -> Reply | None:
        if self._lines and line.code != self._code:
            raise GarbageError(f"a reply of two codes, {self._code} and {line.code}")
        self._code = line.code
        self._lines += line.lines
        if more:
            if len(self._lines) > _MAX_LINES:
                raise GarbageError("a reply that does not end")
            return None
        whole = Reply(self._code, tuple(self._lines))
        self._lines.clear()
        return whole


@lru_cache(maxsize=256)
def _line(line: bytes) -> tuple[Reply, bool]:
    """One line as a reply of its own, and whether more lines follow. Cached: most mails get the same
    answers."""
    code = line[:3]
    # RFC 5321 §4.2 has 0 to 5 as the second digit; servers in use have answered 571. isdigit() on bytes knows
    # ASCII digits alone.
    if (
        len(line) > _MAX_LINE
        or len(code) != 3
        or not code.isdigit()
        or not b"200" <= code < b"600"
        or line[3:4] not in (b" ", b"-", b"")
        or b"\n" in line
        or b"\r" in line
    ):
        raise GarbageError(f"not a reply: {_shown(line)}")
    text = line[4:].decode("utf-8", "replace")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c == "\t" else "?" for c in text)
    return Reply(int(code), (text,)), line[3:4] == b"-"


def _shown(line: bytes) -> str:
    return repr(line[:80])[1:]
