"""The sender service: its stage, the claims in MySQL and the relay that the settings name."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Any

from services.common.config import SETTLE_SECONDS, Settings, refused, variable
from services.common.database.engine import make_engine, url_of
from services.common.deliveries.rows import owner_tokens
from services.common.events import Event
from services.common.forms import is_loopback
from services.common.secret_files import read_secret
from services.common.stage.service import StageService
from services.sender.async_claims import AsyncClaims
from services.sender.claims import Claims
from services.sender.client_name import find_client_name
from services.sender.composer import Composer
from services.sender.leases import Leases
from services.sender.masking import without_addresses
from services.sender.metrics import (
    SENDER_CLAIMS,
    SENDER_DOMAINS,
    SENDER_RELAY_TROUBLE,
    SENDER_RELAY_UP,
    SENDER_SESSIONS,
)
from services.sender.oauth import OAuthTokens
from services.sender.policy import Policy
from services.sender.replies import NotSent
from services.sender.slots import Slots, domain_share
from services.sender.smtp_pool import Credentials, Limits, Relay, SmtpPool, Timeouts, Tls
from services.sender.stage import Sender, stage

__all__ = ["SenderService", "build", "make_relay", "make_tokens"]

# While a session sends a mail, the sender claims its next mails and settles its last ones; more of them
# make larger batches for the database. But after a crash all are in doubt, even if nothing was sent, and
# under `hold` an operator must decide about each. (2,400 mails/s with 2, 2,900 with 4.)
_CLAIMS_PER_SESSION = {"resend": 4, "hold": 2}
_CLOSE_SECONDS = 5.0
_MAX_SHOWN = 300


class SenderService(StageService):
    """The sender's stage, its claims in MySQL and its sessions with the relay."""

    def __init__(self, settings: Settings, client_name: str | None = None) -> None:
        hold = settings.on_uncertain == "hold"
        per_session = _CLAIMS_PER_SESSION[settings.on_uncertain]
        per_domain = domain_share(settings.sender_sessions, settings.domain_concurrency)
        with refused("database_url"):
            url = url_of(settings.database_url.get_secret_value())
        with refused("email_from"):
            composer = Composer(settings.email_from)
        self._tokens = make_tokens(settings)
        relay = make_relay(settings, self._tokens, client_name)
        # Claims, settlements and renewals have a connection each. A renewal without an answer must leave time
        # for another one.
        self._engine = make_engine(url, pool_size=3, read_seconds=max(1, int(settings.lease_seconds / 4)))
        self._claims = AsyncClaims(Claims(self._engine, settings.lease_seconds, hold, settings.max_resends))
        self._leases = Leases(self._claims.renew, settings.lease_seconds)
        self._pool = SmtpPool(
            relay,
            limits=Limits(sessions=settings.sender_sessions, per_domain=settings.domain_concurrency),
            timeouts=Timeouts(after_dot=settings.handover_seconds - SETTLE_SECONDS),
            on_trouble=_export_trouble,
        )
        self._sender = Sender(
            claims=self._claims,
            leases=self._leases,
            pool=self._pool,
            composer=composer,
            policy=Policy(settings.sender_delays, settings.sender_max_age, hold, settings.max_resends),
            claim_slots=Slots(
                per_session * settings.sender_sessions,
                per_session * per_domain,
                rate=settings.domain_rate,
                is_loaded=self._is_loaded,
            ),
            session_slots=Slots(settings.sender_sessions, per_domain),
            publish=self._publish,
            owner=owner_tokens(),
            handover=settings.handover_seconds,
        )
        super().__init__(stage(self._sender, settings.sender_delays), settings)
        SENDER_CLAIMS.set_function(self._leases.__len__)
        SENDER_DOMAINS.set_function(self._sender.domains)
        SENDER_RELAY_UP.labels(f"{settings.email_host}:{settings.email_port}").set_function(
            lambda: self._pool.available
        )
        SENDER_SESSIONS.labels("busy").set_function(lambda: self._pool.state.busy)
        SENDER_SESSIONS.labels("idle").set_function(lambda: self._pool.state.idle)

    def _is_loaded(self) -> bool:
        return self._runtime.over_half()

    async def _publish(self, events: Sequence[Event], traceparent: bytes | None) -> None:
        await self._runtime.publish(events, traceparent)

    def background(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Return what renews the leases and the relay's access token."""
        renewals = [self._leases.run()]
        return renewals if self._tokens is None else [*renewals, self._tokens.run()]

    async def close(self) -> None:
        """Close the sessions, wait a few seconds for the claims that still run, and close the connections."""
        await self._pool.close(grace=1.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._claims.close()
        self._engine.dispose()

    def problems(self) -> list[str]:
        """Return why the service is not ready. Safe from any thread."""
        problems = super().problems()
        if "draining" in problems and (waiting := self._sender.handed_over):
            problems.append(f"{waiting} mails handed over wait for their replies")
        if (error := self._claims.trouble) is not None:
            problems.append(f"database: {error}")
        if self._tokens is not None and (error := self._tokens.trouble) is not None:
            problems.append(f"OAuth token: {error}")
        if (trouble := self._pool.state.trouble) is not None:
            problems.append(f"relay {trouble.relay}: {trouble.phase}: {without_addresses(trouble.cause)}")
        return problems


def _export_trouble(trouble: NotSent | None) -> None:
    # One series at a time: replies contain ids and times, and would make ever more series.
    SENDER_RELAY_TROUBLE.clear()
    if trouble is not None:
        cause = without_addresses(trouble.cause)[:_MAX_SHOWN]
        SENDER_RELAY_TROUBLE.labels(trouble.relay, trouble.phase, cause).set(1)


def make_relay(
    settings: Settings, tokens: OAuthTokens | None = None, client_name: str | None = None
) -> Relay:
    """Return the relay of the settings. Without EMAIL_TLS only a loopback relay is used in clear.

    Raises ValueError, which names the variable, if EMAIL_AUTH lacks a setting or has one too many.
    """
    host = settings.email_host
    tls = Tls(settings.email_tls) if settings.email_tls else Tls.NONE if is_loopback(host) else Tls.STARTTLS
    mechanism = None if settings.email_auth == "auto" else settings.email_auth
    if mechanism is not None and not settings.email_user:
        raise ValueError(f"{variable('email_user')}: must be set where EMAIL_AUTH is {mechanism}")
    if settings.email_pass and not settings.email_user:
        raise ValueError(f"{variable('email_user')}: must be set where EMAIL_PASS is")
    if settings.email_pass and mechanism == "xoauth2":
        raise ValueError(f"{variable('email_pass')}: must be empty where EMAIL_AUTH is xoauth2")
    credentials = (
        Credentials(settings.email_user, settings.email_pass.get_secret_value(), mechanism, tokens)
        if settings.email_user
        else None
    )
    return Relay(host, settings.email_port, tls, credentials, settings.email_helo or client_name)


def make_tokens(settings: Settings) -> OAuthTokens | None:
    """Return the source of access tokens; None if EMAIL_AUTH is not xoauth2.

    Raises ValueError, which names the variable, if a setting is missing, superfluous or unreadable.
    """
    url, client, file = (
        settings.email_oauth_token_url,
        settings.email_oauth_client_id,
        settings.email_oauth_client_secret_file,
    )
    secret, scope = settings.email_oauth_client_secret.get_secret_value(), settings.email_oauth_scope
    if settings.email_auth != "xoauth2":
        for field, value in (
            ("email_oauth_token_url", url),
            ("email_oauth_client_id", client),
            ("email_oauth_client_secret", secret),
            ("email_oauth_client_secret_file", file),
            ("email_oauth_scope", scope),
        ):
            if value:
                raise ValueError(f"EMAIL_AUTH: must be xoauth2 where {variable(field)} is set")
        return None
    for field, value in (("email_oauth_token_url", url), ("email_oauth_client_id", client)):
        if not value:
            raise ValueError(f"{variable(field)}: must be set where EMAIL_AUTH is xoauth2")
    if bool(secret) == bool(file):
        raise ValueError(
            f"{variable('email_oauth_client_secret')}: must be set where EMAIL_AUTH is xoauth2,"
            f" or {variable('email_oauth_client_secret_file')}, and not both"
        )
    if not file:
        return OAuthTokens(url, client, lambda: secret, scope)
    with refused("email_oauth_client_secret_file"):
        read_secret(file)
    return OAuthTokens(url, client, lambda: read_secret(file), scope)


async def build(settings: Settings) -> SenderService:
    """Return the service; it connects to nothing but DNS, for the host's own name, before it runs.

    Raises ValueError for a database URL, an EMAIL_FROM or an EMAIL_AUTH that cannot be used.
    """
    return SenderService(settings, None if settings.email_helo else await find_client_name())
