"""The components that run this project's code: the services, the name server and the catcher."""

import socket
import sys
from collections.abc import Mapping

import dns.exception
import dns.message
import dns.query

from deploy.local.component import Component, http_ok
from deploy.local.environment import service_environment, services_reading, stack_environment
from deploy.local.layout import Layout
from deploy.local.ports import HOST
from deploy.local.state import StackState
from services.common.secret_files import secrets_in_files
from services.common.stages import STAGES

__all__ = ["DRAIN_SECONDS", "catcher_component", "dns_component", "service_component"]

DRAIN_SECONDS = {"POSTROAD_DRAIN_SECONDS": 20.0, "POSTROAD_HANDOVER_SECONDS": 620.0}
"""Seconds that a draining service waits, by setting; the values are the settings' defaults."""
# Seconds for what follows the drain: the last commit, leaving the group, closing.
_CLOSING = 25.0


def service_component(layout: Layout, state: StackState, name: str) -> Component:
    """Return the component of a replica such as `sender-2`. It is ready when its /readyz answers 200."""
    service = name.rpartition("-")[0]
    health = f"{HOST}:{state.port(name, 'http')}"
    env = service_environment(state, name)
    return Component(
        name=name,
        argv=(sys.executable, "-m", "services.api" if service == "api" else STAGES[service].module),
        address=f"{HOST}:{state.port(name, 'grpc')}" if service == "api" else health,
        env=env,
        is_ready=lambda: http_ok(health, "/readyz"),
        grace=_grace(service, env),
    )


def _grace(service: str, env: Mapping[str, str]) -> float:
    """Return the seconds after which a draining service counts as stuck.

    A sender also waits for the replies to the mails that it handed over. That takes long only when a mail
    server is slow. To kill the sender then leaves those mails in doubt.
    """
    waits = [name for name in DRAIN_SECONDS if service in services_reading(name)]
    return _CLOSING + sum(_seconds(env.get(name), DRAIN_SECONDS[name]) for name in waits)


def _seconds(value: str | None, default: float) -> float:
    try:
        return float(value) if value else default
    except ValueError:  # the service refuses to start with it
        return default


def dns_component(layout: Layout, state: StackState) -> Component:
    """Return the component of the name server. It is ready when it answers a question."""
    port = state.port("dns", "dns")

    def is_ready() -> bool:
        try:
            dns.query.udp(dns.message.make_query("good.test.", "MX"), HOST, port=port, timeout=0.5)
        except (OSError, dns.exception.DNSException):
            return False
        return True

    return Component(
        name="dns",
        argv=(sys.executable, "-m", "deploy.local.dns", "--listen", f"{HOST}:{port}",
              "--control", str(layout.dns / "control.json")),
        address=f"{HOST}:{port}",
        is_ready=is_ready,
        grace=5,
    )  # fmt: skip


def catcher_component(layout: Layout, state: StackState) -> Component:
    """Return the component of the catcher. It is ready when it accepts a connection."""
    port = state.port("catcher", "smtp")
    settings = stack_environment(state)

    def is_ready() -> bool:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:
            return False
        return True

    return Component(
        name="catcher",
        argv=(sys.executable, "-m", "deploy.local.catcher", "--listen", f"{HOST}:{port}",
              "--mail-dir", str(layout.mail)),
        address=f"{HOST}:{port}",
        env={"EMAIL_USER": settings["EMAIL_USER"], "EMAIL_PASS": settings.get("EMAIL_PASS", "")}
        | secrets_in_files(settings, ["EMAIL_PASS"]),
        is_ready=is_ready,
        grace=5,
    )  # fmt: skip
