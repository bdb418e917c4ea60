"""The mails that `postroad create` is asked for, from flags or a file."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final

from google.protobuf import json_format

from postroad.v1 import task_service_pb2 as pb
from services.cli.errors import USAGE, Failure

__all__ = ["chunks", "from_flags", "from_lines", "opened", "text_of"]

_MOST: Final = 1000
_MOST_BYTES: Final = 16 << 20
_DATA: Final = frozenset(pb.TaskData.DESCRIPTOR.fields_by_name)


def text_of(path: str, flag: str) -> str:
    """Return a file's text, stdin's for `-`; raises Failure. Line ends stay as they are."""
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode()
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise Failure(f"{flag} {path}: {error.strerror}", USAGE) from None
    except UnicodeDecodeError:
        raise Failure(f"{flag} {path}: the file is not in UTF-8", USAGE) from None


def from_flags(
    emails: Sequence[str], mail: Mapping[str, Any], key: str, send_at: datetime | None
) -> Iterator[pb.CreateRequest]:
    """Yield a request for each recipient; `mail` has TaskData's other fields.

    Several recipients have keys of their own, KEY:ADDRESS, so that the whole command can be repeated.
    """
    for email in emails:
        request = pb.CreateRequest(data=pb.TaskData(email=email, **mail))
        request.idempotency_key = f"{key}:{email}" if key and len(emails) > 1 else key
        if send_at is not None:
            request.send_at.FromDatetime(send_at)
        yield request


def from_lines(lines: Iterable[bytes], name: str) -> Iterator[pb.CreateRequest]:
    """Yield the request of each line, an object: a CreateRequest in JSON, or its `data` put flat.

    Blank lines are skipped. Raises Failure naming the line.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            asked = json.loads(line.decode())
            if not isinstance(asked, dict):
                raise TypeError("no object")
            if "data" not in asked:
                data = {key: asked.pop(key) for key in list(asked) if key in _DATA}
                asked["data"] = data
            yield json_format.ParseDict(asked, pb.CreateRequest())
        except UnicodeDecodeError:
            raise Failure(f"{name}, line {number}: it is not in UTF-8", USAGE) from None
        except (ValueError, TypeError, json_format.ParseError) as error:
            raise Failure(f"{name}, line {number}: {error}", USAGE) from None


def opened(path: str) -> IO[bytes]:
    """Return the file of --batch, `-` for stdin."""
    if path == "-":
        return sys.stdin.buffer
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise Failure(f"--batch {path}: {error.strerror}", USAGE) from None


def chunks(requests: Iterable[pb.CreateRequest]) -> Iterator[list[pb.CreateRequest]]:
    """Yield what fits one BatchCreate: 1,000 requests, and a message that the api takes."""
    for _, chunk in itertools.groupby(requests, _counter()):
        yield list(chunk)


def _counter() -> Any:
    number, items, size = 0, 0, 0

    def which(request: pb.CreateRequest) -> int:
        nonlocal number, items, size
        items, size = items + 1, size + request.ByteSize()
        if items > _MOST or (size > _MOST_BYTES and items > 1):
            number, items, size = number + 1, 1, request.ByteSize()
        return number

    return which
