"""Debian packages: installed by apt, or unpacked by an apt of their own where the release is too old.

Standard library only: `make setup` runs it on a bare python3.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from deploy.local.cache import locked
from deploy.local.commands import SetupError, run, say

__all__ = ["fetch_packages", "has_debian_mirror", "install_packages", "is_debian", "mirror", "preseed"]

OS_RELEASE = Path("/etc/os-release")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def _os_release() -> dict[str, str]:
    try:
        text = OS_RELEASE.read_text()
    except OSError:
        return {}
    return {key: value.strip('"') for key, _, value in (line.partition("=") for line in text.splitlines())}


def is_debian() -> bool:
    """Return whether this is Debian, or a system that calls itself like it and has apt."""
    release = _os_release()
    family = (release.get("ID", ""), *release.get("ID_LIKE", "").split())
    return "debian" in family and shutil.which("apt-get") is not None


def has_debian_mirror() -> bool:
    """Return whether the mirror has Debian's own suites. Those of relatives such as Ubuntu have not."""
    return is_debian() and _os_release().get("ID") == "debian"


def install_packages(names: Iterable[str]) -> None:
    """Install packages by apt, through sudo when this user is not root. Raises SetupError."""
    wanted = list(names)
    if not is_debian():
        raise SetupError(f"not Debian: please install what these Debian packages hold: {', '.join(wanted)}")
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    if sudo and not shutil.which("sudo"):
        raise SetupError(f"neither root nor sudo: please have these packages installed: {', '.join(wanted)}")
    apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    with locked("apt"):
        say(f"installing Debian packages: {' '.join(wanted)}")
        run([*apt, "update"], tries=3)
        run([*apt, "install", "-y", "--no-install-recommends", *wanted], tries=4)


def preseed(answer: str) -> None:
    """Answer a question that a package would ask during its installation (debconf). Needs root."""
    with tempfile.NamedTemporaryFile("w", suffix=".debconf") as file:
        file.write(f"{answer}\n")
        file.flush()
        run(["debconf-set-selections", file.name])


def _entries(text: str, name: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (uri, suites, components) of an apt source file in either style (sources.list(5))."""
    if name.endswith(".sources"):
        for stanza in re.split(r"\n\s*\n", text):
            field: dict[str, list[str]] = {}
            key = ""
            for line in stanza.splitlines():
                if line.startswith("#"):
                    continue
                if line[:1].isspace():
                    field.setdefault(key, []).extend(line.split())
                else:
                    key, _, value = line.partition(":")
                    field[key := key.lower()] = value.split()
            if "deb" in field.get("types", []) and field.get("enabled") != ["no"]:
                for uri in field.get("uris", []):
                    yield uri, field.get("suites", []), field.get("components", [])
    else:
        for line in text.splitlines():
            if match := re.match(r"deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)\s+(.*)", line):
                yield match[1], [match[2]], match[3].split()


def mirror(root: Path = Path("/etc/apt")) -> str:
    """Return the mirror of this machine's own release. Raises SetupError when there is none."""
    suites = {_os_release().get("VERSION_CODENAME", ""), "stable", "testing", "unstable", "sid"} - {""}
    files = [root / "sources.list", *sorted(root.glob("sources.list.d/*"))]
    for file in files:
        if file.suffix in {".list", ".sources"} and file.is_file():
            for uri, has, components in _entries(file.read_text(), file.name):
                if suites & set(has) and "main" in components:
                    return uri
    raise SetupError("no Debian mirror found in the apt sources of this machine")


def fetch_packages(names: Iterable[str], suite: str, target: Path, scratch: Path) -> None:
    """Unpack packages of `suite` with all their dependencies into `target`. Installs nothing; needs no root.

    apt works under `scratch` with an empty dpkg status, so it fetches every dependency, libc included. It
    checks the signatures against Debian's keyring. Raises SetupError.
    """
    if not KEYRING.exists():
        raise SetupError(f"{KEYRING} is missing (package debian-archive-keyring)")
    for directory in ("lists/partial", "archives/partial"):
        (scratch / directory).mkdir(parents=True)
    (scratch / "status").touch()
    (scratch / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror()} {suite} main\n")
    options = [
        f"Dir::State={scratch}",
        f"Dir::State::lists={scratch}/lists",
        f"Dir::State::status={scratch}/status",
        f"Dir::Cache={scratch}",
        f"Dir::Cache::archives={scratch}/archives",
        f"Dir::Etc::sourcelist={scratch}/sources.list",
        "Dir::Etc::sourceparts=-",
        "Dir::Etc::preferences=-",
        "Dir::Etc::preferencesparts=-",
        "APT::Sandbox::User=",
        "Acquire::Languages=none",
        # The signatures of a mirror that is frozen at a date are still good.
        "Acquire::Check-Valid-Until=false",
    ]
    apt = ["apt-get", *(part for option in options for part in ("-o", option))]
    run([*apt, "update", "-qq"], tries=4)
    run([*apt, "-y", "-qq", "--no-install-recommends", "--download-only", "install", *names], tries=4)
    for package in sorted((scratch / "archives").glob("*.deb")):
        run(["dpkg-deb", "-x", package, target])
