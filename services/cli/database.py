"""The database that a command is told of."""

from __future__ import annotations

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from services.cli.errors import USAGE, Failure
from services.common.config import Settings

__all__ = ["url_of"]

_DRIVERS = frozenset({"mysql", "mariadb", "mysql+mysqlconnector", "mariadb+mysqlconnector"})


def url_of(settings: Settings) -> URL:
    """Return the database's URL; raises Failure, which has no password in it, where it is none of ours."""
    try:
        url = make_url(settings.database_url)
    except ArgumentError as error:
        raise Failure(f"the database URL: {error}", USAGE) from None
    except ValueError:
        raise Failure("the database URL: its port is no number", USAGE) from None
    if url.drivername not in _DRIVERS:
        raise Failure(f"the database URL: {url.drivername}:// is neither mysql:// nor mariadb://", USAGE)
    return url
