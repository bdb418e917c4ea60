"""The database that a command is told of."""

from __future__ import annotations

from sqlalchemy import URL

from services.cli.errors import USAGE, Failure
from services.common.config import Settings
from services.common.database import engine

__all__ = ["url_of"]


def url_of(settings: Settings) -> URL:
    """Return the database's URL; raises Failure, which has no password in it, where it is none of ours."""
    try:
        return engine.url_of(settings.database_url)
    except ValueError as error:
        raise Failure(f"POSTROAD_DATABASE_URL (--database): {error}", USAGE) from None
