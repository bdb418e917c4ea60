"""Who can reach the api's listener, and whether that is what the operator wants."""

from __future__ import annotations

import structlog

from services.common.forms import is_loopback

__all__ = ["check_listener", "log_exposure"]

log = structlog.get_logger(__name__)


def check_listener(listen: str, insecure: bool) -> None:
    """Raise ValueError for a listener (host:port) that others can reach, unless the operator accepts that.

    gRPC is plain text here, so whoever is on the way reads tokens and mails.
    """
    if not insecure and not _is_local(listen):
        raise ValueError(
            "must be on loopback, because gRPC is plain text;"
            " POSTROAD_INSECURE=1 allows a wider one, for a network that you trust"
        )


def log_exposure(listen: str, need_tokens: bool) -> None:
    """Log what protects this listener."""
    missing = "TLS" if need_tokens else "TLS and tokens"
    if _is_local(listen):
        log.info(f"without {missing}, on loopback only", listen=listen)
    else:
        log.warning(f"without {missing}, for whoever reaches this address", listen=listen)


def _is_local(listen: str) -> bool:
    return is_loopback(listen.rpartition(":")[0].strip("[]"))
