"""Which variables of the environment are Postroad's, so that one that is misspelt does not go unheard."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

__all__ = ["OTHERS", "unknown"]

OTHERS: Final = frozenset(
    {
        # The `postroad` command's own.
        "POSTROAD_API",
        "POSTROAD_CONFIG",
        "POSTROAD_ENV_FILE",
        "POSTROAD_PROFILE",
        "POSTROAD_TLS",
        "POSTROAD_TOKEN",
        "POSTROAD_TRACEBACK",
        # The local stack's.
        "POSTROAD_LOCAL_API_PORT",
        "POSTROAD_LOCAL_DB",
        "POSTROAD_LOCAL_DIR",
        "POSTROAD_LOCAL_NAME",
        "POSTROAD_LOCAL_REEXEC",
        # compose.yaml's.
        "POSTROAD_DB_PASSWORD",
        "POSTROAD_DB_ROOT_PASSWORD",
        "POSTROAD_PORT",
        # The tests'.
        "POSTROAD_TEST_COMPOSE",
        "POSTROAD_TEST_INFRA",
        "POSTROAD_TEST_LONG",
    }
)
"""What may stand in an environment beside the settings."""

# The local stack's variable for the HTTP address of each replica of a service.
_REPLICA = re.compile(r"POSTROAD_HTTP_[A-Z_]+_[1-9][0-9]*")


def unknown(names: Iterable[str], settings: Iterable[str]) -> list[str]:
    """Return a line for each of these variables that has our prefix and is none of ours.

    `settings` are the variables of the settings. Case does not matter, as it does not to pydantic-settings.
    """
    known = {*settings, *OTHERS}
    strange = sorted(
        name
        for name in names
        if (upper := name.upper()).startswith("POSTROAD_")
        and upper not in known
        and not _REPLICA.fullmatch(upper)
    )
    return [f"{name}: no such variable{_nearest(name.upper(), known)}" for name in strange]


def _nearest(name: str, known: Iterable[str]) -> str:
    found = get_close_matches(name, sorted(known), n=1, cutoff=0.8)
    return f"; the nearest is {found[0]}" if found else ""
