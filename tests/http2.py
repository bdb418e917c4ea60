"""A raw HTTP/2 client for what no gRPC library does: read nothing, or leave a message unfinished."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import NamedTuple, Self

__all__ = ["DATA", "GOAWAY", "HEADERS", "RST_STREAM", "Connection", "Frame", "message"]

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE = 4


class Frame(NamedTuple):
    """One frame of RFC 9113 section 4.1."""

    type: int
    flags: int
    stream: int
    payload: bytes


class Connection:
    """One connection, whose streams have a receive window of `window` bytes each. A context manager."""

    def __init__(self, target: str, window: int = 65535) -> None:
        host, _, port = target.rpartition(":")
        self._target = target
        self._socket = socket.create_connection((host, int(port)), 10)
        # Unlike `select`, `poll` takes a file descriptor of any size.
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._buffer = b""
        self._next_stream = 1
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)
        self._socket.sendall(preface + _frame(SETTINGS, 0, 0, settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's number, for select."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection without a word."""
        self._socket.close()

    def call(
        self, method: str, body: bytes = b"", metadata: Mapping[str, str] | None = None, *, end: bool = True
    ) -> int:
        """Begin a call of `method` ("package.Service/Method"); return its stream's number.

        `body` is what it sends at once: it fits into the first window. Without `end`, more may follow.
        """
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/{method}",
            ":authority": self._target,
            "content-type": "application/grpc",
            "te": "trailers",
            **(metadata or {}),
        }
        frames = [_frame(HEADERS, _END_HEADERS, stream, b"".join(map(_field, fields.items())))]
        parts = [body[at : at + 16384] for at in range(0, len(body), 16384)] or [b""]
        frames += [_frame(DATA, 0, stream, part) for part in parts[:-1]]
        frames.append(_frame(DATA, _END_STREAM if end else 0, stream, parts[-1]))
        self._socket.sendall(b"".join(frames))
        return stream

    def frames(self, seconds: float) -> Iterator[Frame]:
        """Yield what arrives within this time, until the server closes the connection; answer pings."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            while (frame := self._take()) is not None:
                yield frame
            if self._poll.poll(1000 * left):
                try:
                    received = self._socket.recv(1 << 16)
                except ConnectionError:
                    return
                if not received:
                    return
                self._buffer += received

    def ended(self, stream: int, seconds: float) -> bool:
        """Return whether the server ends the stream, or the connection, within this time."""
        deadline = time.monotonic() + seconds
        for frame in self.frames(seconds):
            if frame.stream == stream and (
                frame.type == RST_STREAM or (frame.type in (DATA, HEADERS) and frame.flags & _END_STREAM)
            ):
                return True
        return time.monotonic() < deadline

    def _take(self) -> Frame | None:
        if len(self._buffer) < 9:
            return None
        size = int.from_bytes(self._buffer[:3], "big")
        if len(self._buffer) < 9 + size:
            return None
        kind, flags = self._buffer[3], self._buffer[4]
        frame = Frame(kind, flags, int.from_bytes(self._buffer[5:9], "big"), self._buffer[9 : 9 + size])
        self._buffer = self._buffer[9 + size :]
        if not flags & _ACK and kind in (SETTINGS, PING):
            self._socket.sendall(_frame(kind, _ACK, 0, frame.payload if kind == PING else b""))
        return frame


def message(payload: bytes, *, compressed: bool = False, size: int | None = None) -> bytes:
    """Return a length-prefixed gRPC message; it says that it has `size` bytes."""
    return struct.pack(">BI", compressed, len(payload) if size is None else size) + payload


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _field(field: tuple[str, str]) -> bytes:
    """Return a literal field that no table keeps (RFC 7541 section 6.2.2)."""
    return b"\x00" + b"".join(_string(text.encode()) for text in field)


def _string(text: bytes) -> bytes:
    size, encoded = len(text), bytearray()
    if size < 127:
        return bytes((size,)) + text
    size -= 127
    encoded.append(127)
    while size > 127:
        encoded.append(size & 127 | 128)
        size >>= 7
    encoded.append(size)
    return bytes(encoded) + text
