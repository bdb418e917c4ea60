"""`make setup`: installs what the project needs and this machine lacks. A second run does nothing, quickly.

It installs Debian packages, the virtual environment (from the lock with its hashes), Kafka's jars, and the
database server with an empty data directory. Standard library only: it runs on a bare python3.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deploy.local.cache import locked
from deploy.local.commands import SetupError, run, say
from deploy.local.database_tree import chosen_kind, find_server, make_server, make_template, template_path
from deploy.local.debian import install_packages
from deploy.local.jars import jars_path
from deploy.local.kafka_java import archive_path, make_archive
from deploy.local.packages_for_tests import install_test_packages

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements-dev.lock"
# pip's options for package sources, and uv's variable for each.
PIP_AND_UV = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}
OLDEST_PYTHON = (3, 11)
OLDEST_JAVA = 17


def _has_java() -> bool:
    if not shutil.which("java"):
        return False
    done = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False)
    version = re.search(r'version "(\d+)', done.stderr)
    return version is not None and int(version[1]) >= OLDEST_JAVA


def _missing_packages() -> list[str]:
    missing = []
    if not VENV.exists() and importlib.util.find_spec("ensurepip") is None:
        missing.append("python3-venv")
    if not _has_java():
        missing.append("default-jre-headless")
    if not jars_path().exists() and not shutil.which("mvn"):
        missing.append("maven")
    if not shutil.which("make"):
        missing.append("make")
    return missing


def _venv_stamp() -> str:
    """Return a hash of what the virtual environment is made from; another hash means that it is outdated."""
    files = (LOCK.read_bytes(), (ROOT / "pyproject.toml").read_bytes())
    return hashlib.sha256(b"\0".join((sys.version.encode(), str(ROOT).encode(), *files))).hexdigest()


def _venv_is_current() -> bool:
    stamp = VENV / ".setup"
    return stamp.exists() and stamp.read_text() == _venv_stamp() and (VENV / "bin/python").exists()


def _uv(pip: list[str | Path]) -> list[str | Path]:
    """Return the start of a command that installs into the virtual environment, five times as fast as pip.

    pip installs uv first, by the lock's hash. Raises SetupError.
    """
    with tempfile.TemporaryDirectory(prefix="postroad-") as scratch:
        pinned = Path(scratch) / "uv.lock"
        pinned.write_text(_pinned("uv"))
        run([*pip, "install", "--quiet", "--require-hashes", "--no-deps", "-r", pinned], tries=3)
    configured = run([*pip, "config", "list"])
    for name, variable in PIP_AND_UV.items():
        # uv does not read pip's configuration. A URL may hold a password, so no command line shows it.
        if found := re.search(rf"^(?:global|install|:env:)\.{name}='(.*)'$", configured, re.M):
            os.environ.setdefault(variable, found[1])
    return [VENV / "bin/uv", "pip", "install", "--quiet", "--native-tls", "--python", VENV / "bin/python"]


def _pinned(name: str) -> str:
    """Return the lock's requirement of the package `name`, with its hashes."""
    found = re.search(rf"^{name}==.*\n(?:    --hash=.*\n)+", LOCK.read_text(), re.M)
    if not found:
        raise SetupError(f"{LOCK.name} does not pin {name}")
    return found[0]


def _make_venv() -> None:
    with locked(f"venv-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:16]}"):
        if _venv_is_current():
            return
        if not (VENV / "bin/pip").exists():
            run([sys.executable, "-m", "venv", "--clear", VENV])
        pip: list[str | Path] = [VENV / "bin/python", "-m", "pip"]
        try:
            install = _uv(pip)
            run([*install, "--require-hashes", "-r", LOCK], tries=3)
        except SetupError:
            install = [*pip, "install", "--quiet", "--disable-pip-version-check"]
            run([*install, "--require-hashes", "-r", LOCK], tries=3)
        run([*install, "--no-deps", "--no-build-isolation", "-e", ROOT])
        (VENV / ".setup").write_text(_venv_stamp())


def _is_complete(kind: str) -> bool:
    server = find_server(kind)
    return (
        _venv_is_current()
        and shutil.which("java") is not None
        and jars_path().exists()
        and archive_path().exists()
        and server is not None
        and template_path(server).exists()
    )


def _timed(name: str, make: Callable[[], object]) -> None:
    say(f"{name}: ...")
    began = time.monotonic()
    make()
    if (took := time.monotonic() - began) > 0.5:
        say(f"{name}: {took:.1f} s")


def _for_tests() -> None:
    try:
        install_test_packages()
        if server := find_server("mariadb"):
            make_template(server)
    except SetupError as error:
        say(f"tests that need more are skipped: {error}")


def main(arguments: Sequence[str] = ()) -> int:
    """Install what is missing. Return 0 on success, 1 with the failed installations on stderr.

    `--tests` also installs what only tests need.
    """
    if sys.version_info < OLDEST_PYTHON:
        say(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}")
        return 1
    try:
        kind = chosen_kind()
        if "--tests" in arguments:
            _for_tests()
        if _is_complete(kind):
            return 0
        if packages := _missing_packages():
            _timed("Debian packages", lambda: install_packages(packages))
            if left := _missing_packages():
                raise SetupError(
                    f"still missing after the installation of Debian packages: {', '.join(left)}"
                )
        jobs = {
            "Python packages": _make_venv,
            "Kafka": make_archive,
            "database": lambda: make_template(make_server(kind)),
        }
        failed = []
        with ThreadPoolExecutor(len(jobs)) as pool:
            for name, job in {name: pool.submit(_timed, name, make) for name, make in jobs.items()}.items():
                try:
                    job.result()
                except SetupError as error:
                    failed.append(f"{name}: {error}")
        for text in failed:
            say(f"could not install {text}")
        if failed:
            say("needed: Python 3.11+ with venv, Java 17+, Maven, MySQL 8.4+ (mysqld on the PATH)")
        return 1 if failed else 0
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
