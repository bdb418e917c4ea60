"""The requests of `postroad create`, made from flags or from a file."""

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

__all__ = [
    "batch_chunks",
    "open_batch",
    "read_text",
    "requests_from_flags",
    "requests_from_lines",
    "without_data",
]

_MAX_REQUESTS: Final = 1000
_MAX_BYTES: Final = 16 << 20
_DATA: Final = tuple(pb.TaskData.DESCRIPTOR.fields_by_name)
_REQUEST: Final = tuple(name for name in pb.CreateRequest.DESCRIPTOR.fields_by_name if name != "data")
# The fields of a line that are no texts, and their descriptions.
_KINDS: Final = {
    "headers": "an object of texts",
    "labels": "an object of texts",
    "send_at": "a time (RFC 3339)",
}


def read_text(path: str, flag: str) -> str:
    """Return the text of a file, or of stdin for `-`, with its own line ends. Raises Failure."""
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode()
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise Failure(f"{flag} {path}: {error.strerror}", USAGE) from None
    except UnicodeDecodeError:
        raise Failure(f"{flag} {path}: the file is not in UTF-8", USAGE) from None


def requests_from_flags(
    emails: Sequence[str], mail: Mapping[str, Any], key: str, send_at: datetime | None
) -> Iterator[pb.CreateRequest]:
    """Yield a request for each recipient. `mail` has TaskData's other fields, `key` is the idempotency key.

    Each of several recipients gets KEY:ADDRESS, so that the whole command can be repeated.
    """
    for email in emails:
        request = pb.CreateRequest(data=pb.TaskData(email=email, **mail))
        request.idempotency_key = f"{key}:{email}" if key and len(emails) > 1 else key
        if send_at is not None:
            request.send_at.FromDatetime(send_at)
        yield request


def requests_from_lines(lines: Iterable[bytes], name: str) -> Iterator[pb.CreateRequest]:
    """Yield a request for each line: a CreateRequest in JSON, or its fields and those of its `data` together.

    Blank lines are skipped. Raises Failure, which names the line. `name` is the file's.
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
    """Return the request for a line's object. Raises ValueError, which uses the line's own names."""
    request = pb.CreateRequest()
    fields = dict(asked)
    data = fields.pop("data", None)
    if data is not None and not isinstance(data, dict):
        raise ValueError("data is no object")
    for key, value in {**(data or {}), **fields}.items():
        # Protobuf's JSON takes `idempotencyKey` for `idempotency_key`.
        name = re.sub(r"(?<!^)[A-Z]", lambda capital: f"_{capital[0].lower()}", key)
        in_data = name in _DATA if data is None else key in data
        if name not in (_DATA if in_data else _REQUEST):
            raise ValueError(f"there is no field {key!r}; the fields are {', '.join((*_DATA, *_REQUEST))}")
        try:
            json_format.ParseDict({key: value}, request.data if in_data else request)
        except json_format.ParseError:
            raise ValueError(f"{key} must be {_KINDS.get(name, 'a text')}") from None
    return request


def without_data(text: str) -> str:
    """Return the api's text with its fields' names as flags and files have them: without `data.`."""
    return re.sub(r"(^|; |\s)data\.(?=[a-z_]+\b)", r"\1", text)


def open_batch(path: str) -> IO[bytes]:
    """Return the file of --batch, or stdin for `-`. Raises Failure."""
    if path == "-":
        return sys.stdin.buffer
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise Failure(f"--batch {path}: {error.strerror}", USAGE) from None


def batch_chunks(requests: Iterable[pb.CreateRequest]) -> Iterator[list[pb.CreateRequest]]:
    """Yield as many requests as fit one BatchCreate: at most 1,000, in a message that the api accepts."""
    for _, chunk in itertools.groupby(requests, _chunk_numbers()):
        yield list(chunk)


def _chunk_numbers() -> Any:
    number, items, size = 0, 0, 0

    def chunk_of(request: pb.CreateRequest) -> int:
        nonlocal number, items, size
        items, size = items + 1, size + request.ByteSize()
        if items > _MAX_REQUESTS or (size > _MAX_BYTES and items > 1):
            number, items, size = number + 1, 1, request.ByteSize()
        return number

    return chunk_of
