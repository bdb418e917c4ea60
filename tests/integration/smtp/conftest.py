"""All tests here run on the services' event loop. The long form also runs them on asyncio's own.

Its transports report their buffers differently.
"""

import asyncio
from collections.abc import Callable, Mapping

import uvloop

from tests.forms import LONG

__all__ = ["pytest_asyncio_loop_factories"]


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    loops = {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop, **loops} if LONG else loops
