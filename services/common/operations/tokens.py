"""Changes the tokens file. Every function blocks, and raises OperationError or OSError."""

from __future__ import annotations

import fcntl
import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from services.common.grants import (
    NAME,
    NAME_FORM,
    Grant,
    format_grant,
    parse_grants,
    parse_scopes,
    token_digest,
)
from services.common.operations.errors import InvalidOption, NotFound, OperationError

__all__ = ["add_token", "list_grants", "revoke_token"]

_HEAD = "# id tenant SHA-256-of-the-token scopes not-after\n"
# 256 bits. The prefix lets those who search for leaked secrets find it.
_PREFIX, _TOKEN_BYTES = "postroad_", 32
_ID_BYTES = 4


def add_token(path: Path, tenant: str, scopes: str, not_after: datetime | None) -> tuple[Grant, str]:
    """Make a token, add its grant to the file, and return both. The file does not have the token itself.

    A file that does not exist is made. Raises InvalidOption.
    """
    if NAME.fullmatch(tenant) is None:
        raise InvalidOption("tenant", f"is not {NAME_FORM}")
    try:
        allowed = parse_scopes(scopes)
    except ValueError as error:
        raise InvalidOption("scopes", error) from None
    token = _PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    end = math.inf if not_after is None else float(int(not_after.timestamp()))
    with _changing(path) as write:
        text = _read(path) if path.exists() else _HEAD
        ids = {grant.id for grant in _parse(path, text)}
        while (id_ := secrets.token_hex(_ID_BYTES)) in ids:
            pass
        grant = Grant(id_, tenant, token_digest(token), allowed, end)
        line_end = "" if not text or text.endswith("\n") else "\n"
        write(f"{text}{line_end}{format_grant(grant)}\n")
    return grant, token


def list_grants(path: Path) -> list[Grant]:
    """Return the grants of the file, in its order."""
    return _parse(path, _read(path))


def revoke_token(path: Path, id_: str) -> Grant:
    """Remove a grant from the file, and return it. All other lines stay as they are. Raises NotFound."""
    with _changing(path) as write:
        text = _read(path)
        for grant in _parse(path, text):
            if grant.id == id_:
                lines = text.splitlines(keepends=True)
                write("".join(line for line in lines if line.split(maxsplit=1)[:1] != [id_]))
                return grant
    raise NotFound(f"{path} has no token {id_}")


@contextmanager
def _changing(path: Path) -> Iterator[Callable[[str], None]]:
    """Yield the function that replaces the file, while no other command changes it."""
    path = path.resolve()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # The file itself is replaced, so a lock on it would keep nobody out.
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield lambda text: _replace(path, text, folder)
    finally:
        os.close(folder)


def _replace(path: Path, text: str, folder: int) -> None:
    """Replace the file in one step by one that only its owner may read. Its owner stays the same."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if path.exists():
                owner = path.stat()
                if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        os.fsync(folder)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise OperationError(f"{path}: is not UTF-8") from None


def _parse(path: Path, text: str) -> list[Grant]:
    try:
        return parse_grants(text)
    except ValueError as error:
        raise OperationError(f"{path}: {error}") from None
