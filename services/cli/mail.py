"""The mails that `postroad create` is asked for, from flags or a file."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final

from google.protobuf import json_format

from postroad.v1 import task_service_pb2 as pb
from services.cli.errors import USAGE, Failure

__all__ = ["chunks", "from_flags", "from_lines", "named", "opened", "text_of"]

_MOST: Final = 1000
_MOST_BYTES: Final = 16 << 20
_DATA: Final = tuple(pb.TaskData.DESCRIPTOR.fields_by_name)
_REQUEST: Final = tuple(name for name in pb.CreateRequest.DESCRIPTOR.fields_by_name if name != "data")
# The fields of a line that are no text, and what they are.
_KINDS: Final = {
    "headers": "an object of texts",
    "labels": "an object of texts",
    "send_at": "a time (RFC 3339)",
}


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
                raise TypeError("it is no JSON object")
            yield _request(asked)
        except UnicodeDecodeError:
            raise Failure(f"{name}, line {number}: it is not in UTF-8", USAGE) from None
        except json.JSONDecodeError as error:
            raise Failure(f"{name}, line {number}: it is no JSON object: {error}", USAGE) from None
        except (ValueError, TypeError) as error:
            raise Failure(f"{name}, line {number}: {error}", USAGE) from None


def _request(asked: dict[str, Any]) -> pb.CreateRequest:
    """Return the request that a line's object asks for; raise ValueError by the names that the line has."""
    request = pb.CreateRequest()
    fields = dict(asked)
    data = fields.pop("data", None)
    if data is not None and not isinstance(data, dict):
        raise ValueError("data is no object")
    for key, value in {**(data or {}), **fields}.items():
        # As in protobuf's JSON, `idempotencyKey` is `idempotency_key`.
        name = re.sub(r"(?<!^)[A-Z]", lambda letter: f"_{letter[0].lower()}", key)
        in_data = name in _DATA if data is None else key in data
        if name not in (_DATA if in_data else _REQUEST):
            raise ValueError(f"there is no field {key!r}; the fields are {', '.join((*_DATA, *_REQUEST))}")
        try:
            json_format.ParseDict({key: value}, request.data if in_data else request)
        except json_format.ParseError:
            raise ValueError(f"{key} must be {_KINDS.get(name, 'a text')}") from None
    return request


def named(text: str) -> str:
    """Return the api's words with the fields' names as a file or the flags have them: without `data.`."""
    return re.sub(r"(^|; |\s)data\.(?=[a-z_]+\b)", r"\1", text)


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
