"""The name that the sender gives itself in EHLO if no setting has one."""

import asyncio
import socket

from services.common.forms import is_fqdn

__all__ = ["find_client_name"]

_SECONDS = 5.0


async def find_client_name() -> str | None:
    """Return this host's fully qualified name; None if it has none, or DNS does not answer in time.

    RFC 5321 section 4.1.4 requires the name if there is one, else the address literal.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            name = (await asyncio.to_thread(_fqdn)).rstrip(".")
    except (OSError, UnicodeError):  # TimeoutError is an OSError
        return None
    return name if is_fqdn(name) else None


def _fqdn() -> str:
    name = socket.gethostname()
    return name if "." in name else socket.getfqdn(name)
