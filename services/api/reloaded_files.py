"""Files that a running api reads again once they have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

__all__ = ["ReloadedFiles"]

log = structlog.get_logger(__name__)

T = TypeVar("T")

_Signature = tuple[tuple[int, ...] | None, ...]


class ReloadedFiles(Generic[T]):
    """The value of some files. `value` may be read from any thread.

    `load` reads and checks the files, and may raise ValueError or OSError. Making this object calls it, so it
    blocks, and raises ValueError for a bad file. Later a bad file leaves the value as it is. `problem` then
    says why, and is empty otherwise.
    """

    def __init__(self, paths: Sequence[str], load: Callable[[], T]) -> None:
        self._paths, self._load = [Path(path) for path in paths], load
        self._loaded = self._seen = self._signature()
        self.problem = ""
        self.value = self._read()

    def poll(self) -> bool:
        """Return whether there is a new value. Blocks for as long as the file system does.

        Files are read once they are as they were at the last call. So nobody reads half of a file, or one
        half of a pair.
        """
        signature = self._signature()
        settled, self._seen = signature == self._seen, signature
        if not settled or signature == self._loaded:
            return False
        self._loaded = signature
        try:
            self.value = self._read()
        except ValueError as error:
            self.problem = f"{error}; what was read before holds"
            log.error("a changed file is not used", problem=self.problem)
            return False
        self.problem = ""
        log.info("read again", files=[str(path) for path in self._paths])
        return True

    def _read(self) -> T:
        try:
            return self._load()
        except OSError as error:
            raise ValueError(f"{error.filename or self._paths[0]}: {error.strerror or error}") from None

    def _signature(self) -> _Signature:
        return tuple(map(_stat, self._paths))


def _stat(path: Path) -> tuple[int, ...] | None:
    """Return what changes with a file's content, None where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
