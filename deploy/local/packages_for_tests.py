"""Debian packages that only tests need: a second database, a second mail server, and the documents' tools.

Standard library only: `make test` runs it on a bare python3. Without the packages, the tests that need them
are skipped with that reason.
"""

import os
from pathlib import Path

from deploy.local.database_tree import MARIADB
from deploy.local.debian import install_packages, preseed

__all__ = ["install_test_packages", "missing_test_packages"]

# A file that exists when these packages are installed.
EVERYONE = {
    "/usr/sbin/mariadbd": MARIADB,
    "/usr/bin/my_print_defaults": MARIADB,
    # The documents' commands call them.
    "/usr/bin/jq": ("jq",),
    "/usr/bin/curl": ("curl",),
}
# The Postfix tests need root anyway, and nobody gets a mail server installed unasked.
ROOT = {"/usr/sbin/postfix": ("postfix",), "/usr/sbin/saslpasswd2": ("sasl2-bin", "libsasl2-modules")}


def missing_test_packages() -> list[str]:
    """Return the missing packages that this user's tests need, sorted."""
    needed = EVERYONE | (ROOT if os.geteuid() == 0 else {})
    missing = (names for proof, names in needed.items() if not Path(proof).exists())
    return sorted({name for names in missing for name in names})


def install_test_packages() -> None:
    """Install the missing packages. It starts none of their servers. Raises SetupError."""
    names = missing_test_packages()
    if "postfix" in names:
        preseed("postfix postfix/main_mailer_type select No configuration")
    if names:
        install_packages(names)
