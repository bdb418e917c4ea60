"""Recognises Postroad's environment variables, so that a misspelt one is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

from services.common.stages import STAGES

__all__ = ["OTHERS", "misspelt", "unknown"]

OTHERS: Final = frozenset(
    {
        # Of the `postroad` command.
        "POSTROAD_API",
        "POSTROAD_CA",
        "POSTROAD_CERT",
        "POSTROAD_CONFIG",
        "POSTROAD_ENV_FILE",
        "POSTROAD_KEY",
        "POSTROAD_PROFILE",
        "POSTROAD_TENANT",
        "POSTROAD_TLS",
        "POSTROAD_TOKEN",
        "POSTROAD_TOKEN_FILE",
        "POSTROAD_TOKEN_IN_CLEAR",
        "POSTROAD_TRACEBACK",
        # Of the local stack.
        "POSTROAD_LOCAL_API_PORT",
        "POSTROAD_LOCAL_BROKER_SESSION",
        "POSTROAD_LOCAL_DB",
        "POSTROAD_LOCAL_DIR",
        "POSTROAD_LOCAL_NAME",
        "POSTROAD_LOCAL_REEXEC",
        "POSTROAD_LOCAL_REQUEST_LOG",
        "POSTROAD_LOCAL_STATEMENT_DIGESTS",
        # Of compose.yaml.
        "POSTROAD_DB_PASSWORD",
        "POSTROAD_DB_ROOT_PASSWORD",
        "POSTROAD_PORT",
        # Of the tests.
        "POSTROAD_TEST_COMPOSE",
        "POSTROAD_TEST_INFRA",
        "POSTROAD_TEST_LONG",
        "POSTROAD_TEST_SECURE",
    }
)
"""Postroad's variables that are no settings."""

# The local stack's variable for the HTTP address of each replica of a service.
_SERVICES = "|".join(name.upper().replace("-", "_") for name in ("api", *STAGES))
_REPLICA = re.compile(rf"POSTROAD_HTTP_(?:{_SERVICES})_[1-9][0-9]*")


def misspelt(names: Iterable[str]) -> list[str]:
    """Return a line for each of these variables that looks like a setting but is none."""
    # Importing the settings takes longer than most of the CLI's commands, which seldom get here.
    from services.common.config import variables  # noqa: PLC0415

    return unknown(names, variables())


def unknown(names: Iterable[str], settings: Iterable[str]) -> list[str]:
    """Return a line for each of these variables that has Postroad's prefix but is unknown.

    `settings` are the variables of the settings. Names are compared without case, as in pydantic-settings.
    """
    known = {*settings, *OTHERS}
    unknown_names = sorted(
        name
        for name in names
        if (upper := name.upper()).startswith("POSTROAD_")
        and upper not in known
        and not _REPLICA.fullmatch(upper)
    )
    return [f"{name}: no such variable{_nearest(name.upper(), known)}" for name in unknown_names]


def _nearest(name: str, known: Iterable[str]) -> str:
    found = get_close_matches(name, sorted(known), n=1, cutoff=0.8)
    return f"; the nearest is {found[0]}" if found else ""
