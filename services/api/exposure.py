"""Who can reach the api's listener, and whether that is what the operator wants."""

from __future__ import annotations

import structlog

from services.common.forms import is_loopback

__all__ = ["check_listener", "is_local", "log_exposure"]

log = structlog.get_logger(__name__)


def check_listener(listen: str, insecure: bool, *, tls: bool, is_open: bool) -> None:
    """Raise ValueError for a listener (host:port) that others can reach, unless the operator accepts that.

    Without `tls` whoever is on the way reads tokens and mails. Where the api `is_open`, whoever reaches it
    may do everything.
    """
    if (missing := _missing(tls, is_open)) and not insecure and not is_local(listen):
        raise ValueError(
            f"must be on loopback without {missing};"
            " POSTROAD_INSECURE=1 allows a wider one, for a network that you trust"
        )


def log_exposure(listen: str, *, tls: bool, is_open: bool) -> None:
    """Log what protects this listener."""
    missing = _missing(tls, is_open)
    if not missing:
        log.info("with TLS, for clients with a token or a certificate", listen=listen)
    elif is_local(listen):
        log.info(f"without {missing}, on loopback only", listen=listen)
    else:
        log.warning(f"without {missing}, for whoever reaches this address", listen=listen)


def is_local(listen: str) -> bool:
    """Return whether only this host can reach a listener."""
    return is_loopback(listen.rpartition(":")[0].strip("[]"))


def _missing(tls: bool, is_open: bool) -> str:
    return " and ".join([*([] if tls else ["TLS"]), *(["tokens"] if is_open else [])])
