"""Finds the database server: mysqld on the PATH, MySQL out of Debian's packages, or MariaDB.

Standard library only: `make setup` runs it on a bare python3.
"""

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deploy.local.cache import cache_root, entry_path, make_entry
from deploy.local.commands import SetupError, run, say
from deploy.local.debian import fetch_packages, has_debian_mirror, install_packages

__all__ = ["MARIADB", "Server", "chosen_kind", "find_server", "make_server", "make_template", "template_path"]

SUITE = "sid"
PACKAGES = ("mysql-server-core",)
# Raise the number when `_fetch_tree` keeps other files.
RECIPE = f"1 {SUITE} {' '.join(PACKAGES)}".encode()
OLDEST = (8, 4)
# The installer in the first package calls a program of the second one.
MARIADB = ("mariadb-server-core", "mariadb-client-core")


@dataclass(frozen=True, slots=True)
class Server:
    """How to start a database server. `kind` is `mysql` or `mariadb`; `identity` changes with the version."""

    kind: str
    argv: tuple[str, ...]
    identity: str


def chosen_kind() -> str:
    """Return POSTROAD_LOCAL_DB: `mysql` (default) or `mariadb`. Raises SetupError for another value."""
    kind = os.environ.get("POSTROAD_LOCAL_DB") or "mysql"
    if kind not in {"mysql", "mariadb"}:
        raise SetupError(f"POSTROAD_LOCAL_DB is {kind!r}: it may be mysql or mariadb")
    return kind


def _on_path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _path_mysqld() -> Server | None:
    """Return mysqld of the PATH when it is MySQL 8.4 or later."""
    mysqld = _on_path("mysqld")
    if not mysqld:
        return None
    output = run([mysqld, "--no-defaults", "--version"])
    version = re.search(r"Ver (\d+)\.(\d+)", output)
    if "MariaDB" in output or not version or (int(version[1]), int(version[2])) < OLDEST:
        return None
    return Server("mysql", (mysqld, "--no-defaults"), f"{mysqld} {output.strip()}")


def _tree_server(tree: Path) -> Server:
    """Return the server of a fetched tree. It starts through the loader and the C library of that tree."""
    library = next(tree.glob("usr/lib/*-linux-gnu*"))
    loader = next(library.glob("ld-linux-*.so.*"))
    share = tree / "usr/share/mysql"
    argv = (
        str(loader), "--library-path", str(library), str(tree / "usr/sbin/mysqld"), "--no-defaults",
        f"--lc-messages-dir={share}", f"--character-sets-dir={share}/charsets",
        f"--plugin-dir={tree}/usr/lib/mysql/plugin",
    )  # fmt: skip
    return Server("mysql", argv, tree.name)


def find_server(kind: str) -> Server | None:
    """Return the installed server of that kind, or None. Takes some milliseconds."""
    if kind == "mariadb":
        mariadbd, helper = _on_path("mariadbd"), _on_path("my_print_defaults")
        return Server("mariadb", (mariadbd, "--no-defaults"), mariadbd) if mariadbd and helper else None
    if server := _path_mysqld():
        return server
    tree = entry_path("mysql", RECIPE)
    return _tree_server(tree) if tree.exists() else None


def _fetch_tree(target: Path) -> None:
    """Fetch MySQL's packages and keep a third of them: the server, its libraries and its messages."""
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=cache_root()) as scratch:
        unpacked = Path(scratch) / "tree"
        fetch_packages(PACKAGES, SUITE, unpacked, Path(scratch))
        library = next(unpacked.glob("usr/lib/*-linux-gnu*"))
        kept = [
            unpacked / "usr/sbin/mysqld",
            *(path for path in library.iterdir() if not path.is_dir() and ".so" in path.name),
            unpacked / "usr/share/mysql",
            unpacked / "usr/lib/mysql/plugin",
        ]
        for path in kept:
            place = target / path.relative_to(unpacked)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)


def make_server(kind: str) -> Server:
    """Return the server of that kind, and install it if it is missing. Raises SetupError."""
    if server := find_server(kind):
        return server
    if kind == "mariadb":
        install_packages(MARIADB)
    elif has_debian_mirror():
        say("fetching MySQL from Debian (60 MB)")
        make_entry("mysql", RECIPE, _fetch_tree)
    if server := find_server(kind):
        return server
    raise SetupError(
        "no MySQL 8.4 or later, which is fetched on Debian itself alone: please install one so that mysqld is"
        " on the PATH (on Ubuntu: package mysql-server-core, where the release has 8.4),"
        " or set POSTROAD_LOCAL_DB=mariadb"
    )


def _template_recipe(server: Server) -> bytes:
    return f"1 {server.kind} {server.identity}".encode()


def template_path(server: Server) -> Path:
    """Return the path of the initialised, empty data directory of `server`."""
    return entry_path(f"{server.kind}-data", _template_recipe(server))


def make_template(server: Server) -> Path:
    """Make the data directory that each new stack copies: 0.2 s instead of 2-6 s. Raises SetupError."""

    def build(target: Path) -> None:
        data = target / "data"
        # Both servers run as root only with this flag.
        user = ["--user=root"] if os.geteuid() == 0 else []
        if server.kind == "mariadb":
            install = _on_path("mariadb-install-db")
            if not install:
                raise SetupError("mariadb-install-db is missing")
            run([install, "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal",
                 "--skip-test-db", "--innodb-log-file-size=8M", *user])  # fmt: skip
        else:
            run([*server.argv, "--initialize-insecure", f"--datadir={data}", "--innodb-redo-log-capacity=8M",
                 "--innodb-undo-log-truncate=ON", *user])  # fmt: skip
            (data / "auto.cnf").unlink()

    return make_entry(f"{server.kind}-data", _template_recipe(server), build)
