"""The cache of downloads: all clones of this user share it, and the recipe of an entry is its key.

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
    """Return `$XDG_CACHE_HOME/postroad`, or `~/.cache/postroad` (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "postroad"


def entry_path(kind: str, recipe: bytes) -> Path:
    """Return the path of the entry made from `recipe`, whether or not it exists."""
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
    """Return the directory for `recipe`; `build(directory)` makes it if it does not exist.

    The build fills a temporary directory, which is renamed when it is complete. So an interrupted build
    leaves no entry. A lock makes a second clone wait for the first one's build. Blocks as long as the build
    takes, and raises what `build` raises.
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
