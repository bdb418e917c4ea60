"""What was downloaded once, shared by every clone of this user and keyed by what it was made from.

Standard library only: `make setup` runs it on a bare python3.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["cache_root", "entry_path", "locked", "make_entry"]


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/postroad`, by default `~/.cache/postroad` (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "postroad"


def entry_path(kind: str, recipe: bytes) -> Path:
    """Where the entry made from `recipe` stands, whether or not it has been made yet."""
    return cache_root() / f"{kind}-{hashlib.sha256(recipe).hexdigest()[:16]}"


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock called `name`; blocks while another process of this user holds it."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_entry(kind: str, recipe: bytes, build: Callable[[Path], None]) -> Path:
    """The directory for `recipe`, made by `build(directory)` if it is not there.

    The build fills a temporary directory that is renamed when it is whole, under a lock: a second clone
    setting up at the same time waits and then finds the entry, and an interrupted build leaves nothing that
    looks finished. May block for as long as the build takes; what `build` raises is raised.
    """
    path = entry_path(kind, recipe)
    if path.exists():
        return path
    with locked(path.name):
        if not path.exists():
            partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=cache_root()))
            try:
                partial.chmod(0o755)
                build(partial)
                partial.rename(path)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return path
