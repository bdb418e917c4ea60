"""A lenient parser of a mail server's replies: servers in use break RFC 5321 §4.2."""

import re
from functools import lru_cache
from typing import NamedTuple

from services.sender.masking import Mask
from services.sender.replies import Reply

__all__ = ["GarbageError", "ReplyParser"]

# RFC 5321 §4.5.3.1.5 allows 512 bytes a line. Longer lines and replies of more lines are cut.
_MAX_LINE = 2048
_MAX_LINES = 128
# A server that sends more bytes than this in one reply does not speak SMTP.
_MAX_REPLY = 1 << 17

# RFC 5321 §4.2 allows 0 to 5 as the second digit; servers in use have sent 571.
_CODE = re.compile(rb"\s*([2-5][0-9]{2})(?![0-9])(-?)[ \t]?", re.ASCII)
# Inside a reply, a line without a code is text.
_NEXT_CODE = re.compile(rb"([2-5][0-9]{2})(?:(-)|[ \t]|$)", re.ASCII)


class GarbageError(Exception):
    """The bytes are not SMTP. Nothing that follows on this connection can be trusted."""

    replies: list[Reply]
    """The whole replies before it in the same bytes."""

    unparsed: str
    """The line that is no reply, as received."""

    def __init__(self, cause: str, unparsed: str = "") -> None:
        super().__init__(f"{cause}: {unparsed!r}" if unparsed else cause)
        self.replies = []
        self.unparsed = unparsed


class _Line(NamedTuple):
    code: int
    """0 if the line has none."""
    text: str
    more: bool
    """Whether another line of the reply follows."""


class ReplyParser:
    """Splits a stream of bytes into replies.

    A line may end with a bare LF; empty lines are ignored. If the lines of a reply have different codes, the
    last one decides (RFC 5321 §4.2.1). The parser cuts what is too long. A reply whose first line has no code
    is garbage, unless the parser is `lenient`.
    """

    __slots__ = ("_buffer", "_first", "_lines", "_size", "lenient", "mask")

    def __init__(self) -> None:
        self._buffer = b""
        self._lines: list[_Line] = []
        self._first = 0
        self._size = 0
        self.lenient = 0
        """In this many of the next replies, lines without a code belong to the reply that follows them."""
        self.mask = Mask()
        """Masks every line before it is parsed."""

    @property
    def empty(self) -> bool:
        """True if `feed` has returned all bytes as whole replies."""
        return not self._buffer.strip() and not self._lines

    @property
    def unfinished(self) -> Reply | None:
        """The reply that has begun and not ended, as far as it can be read; None without a code."""
        lines = list(self._lines)
        if self._buffer.strip():
            lines.append(_line(self.mask(self._buffer)[: _MAX_LINE + 1], bool(self._first)))
        return _whole(lines) if any(line.code for line in lines) else None

    @property
    def unparsed(self) -> str:
        """The text of the unfinished reply, as received, for operators."""
        lines = [line.text if not line.code else _coded(line) for line in self._lines]
        return " ".join([*lines, _shown(self.mask(self._buffer)[:_MAX_LINE].strip())]).strip()

    def feed(self, data: bytes) -> list[Reply]:
        """Take received bytes; return the replies that they complete, oldest first.

        Raises:
            GarbageError: the stream is not a sequence of replies. Afterwards only `unfinished` is valid.
        """
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        replies: list[Reply] = []
        for raw in lines:
            if not self._lines and (reply := _one_line(self.mask(raw)[: _MAX_LINE + 1])) is not None:
                replies.append(reply)
                self.lenient -= self.lenient > 0
                continue
            if not raw.strip():
                continue
            line = _line(self.mask(raw)[: _MAX_LINE + 1], bool(self._first))
            self._size += len(raw)
            if len(self._lines) >= _MAX_LINES:
                # The last line decides, so it replaces the one before.
                del self._lines[_MAX_LINES - 1 :]
            self._lines.append(line)
            self._first = self._first or line.code
            if line.code and not line.more:
                replies.append(_whole(self._lines))
                self.lenient -= self.lenient > 0
                self._lines.clear()
                self._first = self._size = 0
            elif not self._first and not self.lenient:
                self._lines.clear()
                self._buffer = b""
                raise _garbage("not a reply", replies, line.text[:200])
        if self._size + len(self._buffer) > _MAX_REPLY:
            raise _garbage("a reply that does not end", replies)
        return replies


def _garbage(cause: str, replies: list[Reply], unparsed: str = "") -> GarbageError:
    error = GarbageError(cause, unparsed)
    error.replies = replies
    return error


def _whole(lines: list[_Line]) -> Reply:
    """Return the reply of these lines; those with another code than the last follow the others, code
    included."""
    code = next(line.code for line in reversed(lines) if line.code)
    own = [line.text for line in lines if line.code in (0, code)]
    return Reply(code, (*own, *(_coded(line) for line in lines if line.code not in (0, code))))


def _coded(line: _Line) -> str:
    return f"{line.code}{'-' if line.more else ' '}{line.text}".rstrip()


# Cached, since most mails get the same replies.
@lru_cache(maxsize=256)
def _one_line(raw: bytes) -> Reply | None:
    """Return the reply that this line is by itself; None if it is not a whole one."""
    line = _line(raw, False)
    return Reply(line.code, (line.text,)) if line.code and not line.more else None


def _line(raw: bytes, inside: bool) -> _Line:
    """Parse one line; `inside` says that its reply has begun."""
    found = (_NEXT_CODE if inside else _CODE).match(raw.rstrip(b"\r"))
    if found is None:
        return _Line(0, _shown(raw[:_MAX_LINE].rstrip()), True)
    return _Line(int(found[1]), _shown(raw[found.end() : _MAX_LINE].rstrip(b"\r")), bool(found[2]))


def _shown(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c == "\t" else "?" for c in text)
    return text
