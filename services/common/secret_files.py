"""Reads secrets from files: `NAME_FILE` names the file that holds the value of the variable `NAME`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from services.common.forms import without_line_end

__all__ = ["SUFFIX", "read_secret", "secrets_in_files"]

SUFFIX: Final = "_FILE"
"""The end of a variable's name that names a file."""


def secrets_in_files(variables: Mapping[str, str], secrets: Iterable[str]) -> dict[str, str]:
    """Return those of these secrets whose files `variables` name, by the secret's own variable.

    An empty variable counts as not set. Names are compared without case. Blocks. Raises ValueError, which
    names the variable, for a secret that is given twice, and for a file that is unreadable or empty.
    """
    given = {name.upper(): value for name, value in variables.items() if value}
    found = {}
    for name in secrets:
        if not (path := given.get(name + SUFFIX)):
            continue
        if given.get(name):
            raise ValueError(f"{name}: is given, and so is {name + SUFFIX}; unset one of them")
        try:
            found[name] = read_secret(path)
        except ValueError as error:
            raise ValueError(f"{name + SUFFIX}: {error}") from None
    return found


def read_secret(path: str) -> str:
    """Return a file's content without the line end at its end.

    Blocks. Raises ValueError for a file that is empty or unreadable.
    """
    try:
        secret = without_line_end(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        # The decoder's error would quote the secret.
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"cannot be read: {reason}") from None
    if not secret:
        raise ValueError("the file is empty")
    return secret
