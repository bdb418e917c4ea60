"""Where a command's connections come from: flag > environment > env file > profile > default.

Each value is known by its environment variable. Flags and profiles are other spellings of it.

This module reads the files itself, since importing pydantic-settings takes as long as all else that `postroad
list` imports (docs/adr/0029). Only commands that need `Settings` import it.

A profile is a table of the config file (`$XDG_CONFIG_HOME/postroad/config.toml`):

    default-profile = "staging"

    [profiles.staging]
    api = "tasks.staging.example:443"
    tls = true
    token-file = "/home/ann/.config/postroad/token"
    kafka = "kafka-1:9092,kafka-2:9092"
    database = "mysql+mysqlconnector://postroad:...@mysql/postroad"
    topic-prefix = "staging."
    partitions = 24              # any other setting, by its variable's name without POSTROAD_
"""

from __future__ import annotations

import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from services.cli.errors import USAGE, Failure
from services.cli.terminal import say
from services.common.environment import misspelt, unknown
from services.common.secret_files import SUFFIX, secrets_in_files

if TYPE_CHECKING:
    from services.common.config import Settings

__all__ = [
    "VARIABLES",
    "effective_variables",
    "make_settings",
    "profile_variables",
    "read_config_file",
    "read_env_file",
    "with_token",
]

VARIABLES: Final = {
    "api": "POSTROAD_API",
    "token": "POSTROAD_TOKEN",
    "tls": "POSTROAD_TLS",
    "ca": "POSTROAD_CA",
    "cert": "POSTROAD_CERT",
    "key": "POSTROAD_KEY",
    "token-in-clear": "POSTROAD_TOKEN_IN_CLEAR",
    "tenant": "POSTROAD_TENANT",
    "kafka": "POSTROAD_KAFKA_BOOTSTRAP",
    "database": "POSTROAD_DATABASE_URL",
    "topic-prefix": "POSTROAD_TOPIC_PREFIX",
}
"""The variables by the names of their flags, which profiles use too."""
# A line of a file that sets a secret. A database's URL usually has a password.
_SECRET: Final = re.compile(
    r"^\s*(?:export )?(?:(?:POSTROAD_)?(?:(?:[\w-]+[_-])?(?:TOKENS?|PASSWORD)|TOKEN[_-]KEYS)"
    r"|(?:POSTROAD_)?DATABASE(?:[_-]URL)?|EMAIL_\w*(?:PASS|SECRET))\s*=",
    re.MULTILINE | re.IGNORECASE,
)


def effective_variables(given: Mapping[str, str | None], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the effective value of each variable that is set anywhere.

    `given` are the flags by the names of VARIABLES, and `profile`, `config` and `env-file`. None is a flag
    that is not given. Raises Failure for a file or profile that is wrong or missing, and for an unknown
    variable that looks like a setting.
    """
    file = given.get("env-file") or environment.get("POSTROAD_ENV_FILE")
    outer = _over(read_env_file(Path(file)) if file else {}, environment)
    _refuse_misspelt(outer)
    named = given.get("profile") or outer.get("POSTROAD_PROFILE")
    flags = {
        VARIABLES[name]: value for name, value in given.items() if name in VARIABLES and value is not None
    }
    profile = profile_variables(read_config_file(given.get("config"), outer), named)
    return _over(_over(profile, outer), flags)


def read_config_file(given: str | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the config file's content, empty where there is none and the user named none. Raises Failure."""
    named = given or environment.get("POSTROAD_CONFIG")
    home = Path(environment.get("XDG_CONFIG_HOME") or "~/.config")
    path = Path(named) if named else home / "postroad/config.toml"
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        config = tomllib.loads(text)
        if _SECRET.search(text):
            _warn_if_readable(path.expanduser())
        return config
    except (FileNotFoundError, NotADirectoryError, PermissionError, RuntimeError) as error:
        # RuntimeError: this user has no home. An unreadable file matters only to a user who named it.
        if not named:
            return {}
        reason = "no such config file" if isinstance(error, FileNotFoundError) else _reason(error)
        raise Failure(f"{path}: {reason}", USAGE) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Failure(f"{path}: {_reason(error)}", USAGE) from None


def profile_variables(config: Mapping[str, Any], name: str | None) -> dict[str, str]:
    """Return the variables of the named profile, or else of the config file's default one. Raises Failure."""
    profiles = config.get("profiles", {})
    wanted = name or config.get("default-profile")
    if wanted is None:
        return {}
    if not isinstance(wanted, str):
        raise Failure(f"default-profile in the config file is {wanted!r}, no profile's name", USAGE)
    if not isinstance(profiles, dict) or not isinstance(profiles.get(wanted), dict):
        known = ", ".join(profiles) if isinstance(profiles, dict) and profiles else "none"
        raise Failure(f"no profile {wanted!r} in the config file; it has: {known}", USAGE)
    found = {}
    for key, value in profiles[wanted].items():
        variable = VARIABLES.get(key) or _variable_of(wanted, key)
        found[variable] = _variable_text(wanted, key, value)
    return found


def read_env_file(path: Path) -> dict[str, str]:
    """Return the variables of a file of `NAME=value` lines, such as the local stack's stack.env.

    Raises Failure.
    """
    try:
        text = path.read_text()
        if _SECRET.search(text):
            _warn_if_readable(path)
        lines = text.splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path}: {_reason(error)}", USAGE) from None
    found = {}
    for number, raw in enumerate(lines, start=1):
        line = raw.strip().removeprefix("export ")
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.isidentifier():
            raise Failure(f"{path}, line {number}: no NAME=value", USAGE)
        found[name] = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    return found


def make_settings(effective: Mapping[str, str]) -> Settings:
    """Return the settings with these variables.

    Raises `pydantic.ValidationError`, and Failure for a secret's file.
    """
    from services.common.config import Settings, file_secrets  # noqa: PLC0415

    try:
        secrets = file_secrets(effective)
    except ValueError as error:
        raise Failure(error, USAGE) from None
    given = {}
    for name, field in Settings.model_fields.items():
        variable = str(field.validation_alias or f"POSTROAD_{name.upper()}")
        if variable in effective:
            given[name] = effective[variable]
    return Settings(**given | secrets)  # type: ignore[arg-type]


def with_token(effective: Mapping[str, str]) -> Mapping[str, str]:
    """Return these variables with the bearer token that POSTROAD_TOKEN_FILE holds. Raises Failure."""
    try:
        return {**effective, **secrets_in_files(effective, ["POSTROAD_TOKEN"])}
    except ValueError as error:
        raise Failure(error, USAGE) from None


def _over(lower: Mapping[str, str], upper: Mapping[str, str]) -> dict[str, str]:
    """Return both; where they disagree, `upper` wins. A secret and its file are two forms of one value."""
    other = {name + SUFFIX for name in upper} | {name.removesuffix(SUFFIX) for name in upper}
    return {name: value for name, value in lower.items() if name not in other} | dict(upper)


def _warn_if_readable(path: Path) -> None:
    """Warn if others than its owner may read a file with secrets."""
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        say(f"postroad: {path} has a token or a password, and others may read it: chmod 600 {path}")


def _refuse_misspelt(names: Iterable[str]) -> None:
    # Often these variables suffice; misspelt imports the settings, which takes longer than most commands.
    if unknown(names, VARIABLES.values()) and (lines := misspelt(names)):
        raise Failure("; ".join(lines), USAGE)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _variable_of(name: str, key: str) -> str:
    from services.common.config import variables  # noqa: PLC0415

    plain = key.replace("-", "_").upper()
    found = plain if plain.startswith("EMAIL_") else f"POSTROAD_{plain}"
    if found not in {*variables(), "POSTROAD_TOKEN_FILE"}:
        raise Failure(f"profile {name!r}: unknown key {key!r}", USAGE)
    return found


def _variable_text(name: str, key: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, int) for part in value):
        return ",".join(map(str, value))
    raise Failure(f"profile {name!r}: {key} is neither text, number nor true or false", USAGE)
