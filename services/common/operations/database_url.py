"""The database's URL, as operations need it."""

from __future__ import annotations

from sqlalchemy import URL

from services.common.config import Settings
from services.common.database import engine
from services.common.operations.errors import InvalidDatabaseUrl

__all__ = ["database_url"]


def database_url(settings: Settings) -> URL:
    """Return the database's URL. Raises InvalidDatabaseUrl, whose text holds no password."""
    try:
        return engine.url_of(settings.database_url.get_secret_value())
    except ValueError as error:
        raise InvalidDatabaseUrl(str(error)) from None
