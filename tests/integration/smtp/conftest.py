"""All tests here run on the services' event loop. The long form also runs them on asyncio's own.

Its transports report their buffers differently.
"""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

from services.sender import smtp_transaction
from tests.forms import LONG

__all__ = ["pytest_asyncio_loop_factories"]


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    loops = {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop, **loops} if LONG else loops


@pytest.fixture(autouse=True)
def any_session_is_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have mails chained however slow the machine is."""
    monkeypatch.setattr(smtp_transaction, "_PROMPT", 60.0)
