"""Bytes from a mail server become replies: read leniently, since servers in use break RFC 5321 §4.2."""

import re
from functools import lru_cache
from typing import NamedTuple

from services.sender.masking import Mask
from services.sender.replies import Reply

__all__ = ["GarbageError", "ReplyParser"]

# RFC 5321 §4.5.3.1.5 allows 512 bytes a line; what is longer is cut, and so is a reply of more lines.
_MAX_LINE = 2048
_MAX_LINES = 128
# A server that sends so many bytes without ending its reply does not speak SMTP.
_MAX_REPLY = 1 << 17

# RFC 5321 §4.2 has 0 to 5 as the second digit; servers in use have answered 571.
_CODE = re.compile(rb"\s*([2-5][0-9]{2})(?![0-9])(-?)[ \t]?", re.ASCII)
# Inside a reply what is no code may be text that has lost its own.
_NEXT_CODE = re.compile(rb"([2-5][0-9]{2})(?:(-)|[ \t]|$)", re.ASCII)


class GarbageError(Exception):
    """What came is not SMTP. Nothing that follows on this connection can be trusted."""

    replies: list[Reply]
    """The whole replies that came before it in the same bytes."""

    unparsed: str
    """The line that is no reply, as it came."""

    def __init__(self, cause: str, unparsed: str = "") -> None:
        super().__init__(f"{cause}: {unparsed!r}" if unparsed else cause)
        self.replies = []
        self.unparsed = unparsed


class _Line(NamedTuple):
    code: int
    """0 where the line has none."""
    text: str
    more: bool
    """Whether the reply goes on with a further line."""


class ReplyParser:
    """Cuts a stream of bytes into replies.

    A line may end with a bare LF, and empty lines mean nothing. Where the lines of a reply carry different
    codes the last one decides (RFC 5321 §4.2.1). What is too long is cut. A reply that begins with a line
    without a code is garbage, unless `lenient`.
    """

    __slots__ = ("_buffer", "_first", "_lines", "_size", "lenient", "mask")

    def __init__(self) -> None:
        self._buffer = b""
        self._lines: list[_Line] = []
        self._first = 0
        self._size = 0
        self.lenient = False
        """Whether lines without a code before a reply are read as a part of it."""
        self.mask = Mask()
        """What is taken out of every line before it is read."""

    @property
    def empty(self) -> bool:
        """True when all bytes that were fed have been given back as whole replies."""
        return not self._buffer.strip() and not self._lines

    @property
    def unfinished(self) -> Reply | None:
        """What can be read of a reply that has begun and not ended; None if no code can be."""
        lines = list(self._lines)
        if self._buffer.strip():
            lines.append(_line(self.mask(self._buffer)[: _MAX_LINE + 1], bool(self._first)))
        return _whole(lines) if any(line.code for line in lines) else None

    @property
    def unparsed(self) -> str:
        """The text of what has begun and not ended, as it came; for the operator's eyes."""
        lines = [line.text if not line.code else _coded(line) for line in self._lines]
        return " ".join([*lines, _shown(self.mask(self._buffer)[:_MAX_LINE].strip())]).strip()

    def feed(self, data: bytes) -> list[Reply]:
        """Take what was received; return the replies that it completes, oldest first.

        Raises:
            GarbageError: the stream is not a sequence of replies. Only `unfinished` is then still of use.
        """
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        replies: list[Reply] = []
        for raw in lines:
            if not raw.strip():
                continue
            line = _line(self.mask(raw)[: _MAX_LINE + 1], bool(self._first))
            self._size += len(raw)
            if len(self._lines) >= _MAX_LINES:
                # The last line decides, so it stands.
                del self._lines[_MAX_LINES - 1 :]
            self._lines.append(line)
            self._first = self._first or line.code
            if line.code and not line.more:
                replies.append(_whole(self._lines))
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
    """The reply that these lines make. Those of another code than the last one stand behind, with it."""
    code = next(line.code for line in reversed(lines) if line.code)
    own = [line.text for line in lines if line.code in (0, code)]
    return Reply(code, (*own, *(_coded(line) for line in lines if line.code not in (0, code))))


def _coded(line: _Line) -> str:
    return f"{line.code}{'-' if line.more else ' '}{line.text}".rstrip()


# Cached: most mails get the same answers.
@lru_cache(maxsize=256)
def _line(raw: bytes, inside: bool) -> _Line:
    """One line; `inside` a reply that has begun."""
    found = (_NEXT_CODE if inside else _CODE).match(raw.rstrip(b"\r"))
    if found is None:
        return _Line(0, _shown(raw[:_MAX_LINE].rstrip()), True)
    return _Line(int(found[1]), _shown(raw[found.end() : _MAX_LINE].rstrip(b"\r")), bool(found[2]))


def _shown(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace")
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " if c == "\t" else "?" for c in text)
    return text
