"""The list of stages, and the service that runs a stage of it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from importlib.util import find_spec
from typing import Any

import pytest

from services.common.config import Settings
from services.common.kafka.topics import EVENT_TOPICS
from services.common.stage import service
from services.common.stage.types import Done, Stage
from services.common.stages import DELAYING, STAGES, StageSpec, stage_delays


@pytest.mark.parametrize("spec", STAGES.values(), ids=lambda spec: spec.name)
def test_each_stage_has_a_module_topics_decoders_and_settings(spec: StageSpec) -> None:
    assert find_spec(spec.module) is not None
    assert set(spec.reads) <= set(EVENT_TOPICS)
    assert set(spec.decoders) == set(spec.reads)
    assert not spec.delays_setting or spec.delays_setting in Settings.model_fields
    assert spec.replicas >= 1


def test_the_delays_of_each_stage_come_from_its_setting() -> None:
    delays = stage_delays(Settings(validator_delays=(3,), sender_delays=(4, 5)))
    assert (delays["validator"], delays["sender"], delays["status"]) == ((3,), (4, 5), ())
    assert delays.keys() == STAGES.keys()
    assert {name for name, seconds in delays.items() if seconds} <= set(DELAYING) <= STAGES.keys()
    assert "status" not in DELAYING


class FakeRuntime:
    """Runs until it is stopped."""

    def __init__(self, stage: Stage, settings: Settings, *, source: str) -> None:
        assert source == stage.name
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        await self._stopped.wait()

    def stop(self) -> None:
        self._stopped.set()

    def problems(self) -> list[str]:
        return ["draining"] if self._stopped.is_set() else []


class FailingRuntime(FakeRuntime):
    """Fails once the work beside it has begun."""

    async def run(self) -> None:
        await asyncio.sleep(0)
        raise RuntimeError("the stage has failed")


class Service(service.StageService):
    """Records what becomes of its background work and of its close."""

    def __init__(self) -> None:
        super().__init__(Stage.of(STAGES["status"], handle=lambda _: Done()), Settings())
        self.events: list[str] = []

    def background(self) -> Sequence[Coroutine[Any, Any, None]]:
        return (self._work(),)

    async def _work(self) -> None:
        self.events.append("began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.events.append("closed")


async def test_the_work_beside_a_stage_ends_with_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "StageRuntime", FakeRuntime)
    made = Service()
    run = asyncio.create_task(made.run())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (made.events, made.problems()) == (["began"], [])
    made.stop()
    assert made.problems() == ["draining"]
    await run
    assert made.events == ["began", "cancelled", "closed"]


async def test_a_failed_stage_is_closed_and_its_error_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "StageRuntime", FailingRuntime)
    made = Service()
    with pytest.raises(RuntimeError, match="the stage has failed"):
        await made.run()
    assert made.events == ["began", "cancelled", "closed"]
