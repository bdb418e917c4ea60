"""Topics get more partitions while tasks are under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from services.common.stages import STAGES
from tests.cli import Command
from tests.e2e.pipeline import Pipeline, until
from tests.stack import Stack


def test_growing_under_load_loses_and_repeats_nothing(new_stack: Callable[..., Stack]) -> None:
    """Keys move to other partitions while tasks are in every state, also deferred."""
    stack = new_stack(POSTROAD_SENDER_DELAYS="1,3", POSTROAD_VALIDATOR_DELAYS="1,3")
    stack.up()
    postroad = Command({"POSTROAD_ENV_FILE": str(stack.directory / "stack.env"), "POSTROAD_PARTITIONS": "6"})
    refused = postroad("topics", "apply")
    assert (refused.code, refused.out) == (1, "")
    prefix = stack.names.prefix
    assert f"differs {prefix}mx.ok: 3 partitions, wanted 6" in refused.err.splitlines()
    no = postroad.on_terminal("topics", "apply", "--grow", typed="n\n")
    assert (no.code, no.out) == (1, "")
    *listed, last = no.err.splitlines()
    assert len(listed) == 14
    assert f"grow {prefix}mx.ok from 3 to 6 partitions, for good" in listed
    assert last == "Change 14 topics? [y/N] postroad: nothing was done"

    with Pipeline(stack) as pipeline:

        def lag() -> dict[str, list[dict[str, Any]]]:
            done = postroad("lag", "--partitions", "--interval", "0", "-o", "json")
            assert done.code == 0, done.err
            found: dict[str, list[dict[str, Any]]] = done.json
            return found

        ids: list[str] = []
        enough = threading.Event()

        def load() -> None:
            number = 0
            while not enough.is_set() or number % 20:
                kind = "greylist" if number % 3 == 0 else "x"
                ids.append(pipeline.create_surely(f"{kind}+{number}@good.test", f"grow-{number}"))
                number += 1
                time.sleep(0.08)

        thread = threading.Thread(target=load)
        thread.start()
        until(lambda: len(ids) > 30, "under load")
        grown = postroad("topics", "apply", "--grow", "--yes", "-o", "json")
        assert grown.code == 0, grown.err
        assert {row["state"] for row in grown.json} == {"grown"}
        topics = ("task.created", "mx.ok", "sender.delay.1", "sender.dead")
        assert {row["topic"] for row in grown.json} >= {prefix + topic for topic in topics}
        waiting = [row for row in lag()["delays"] if row["waiting"]]
        assert waiting, "tasks were deferred when the topics grew"
        before = len(ids)
        # The stages' producers use the new partitions within five minutes; a restart is faster.
        for service in (*STAGES, "api"):
            stack.stop(f"{service}-1")
        Stack(stack.directory, {"POSTROAD_PARTITIONS": "6"}).up()
        until(lambda: len(ids) > before + 30, "more tasks")
        enough.set()
        thread.join(60)
        pipeline.settled(ids, 120)
        pipeline.sent_once(ids)

        until(lambda: all(row["lag"] + row["delayed"] == 0 for row in lag()["stages"]), "no lag", 30)
        used = {row["partition"] for row in lag()["partitions"] if row["topic"] == "mx.ok" and row["end"]}
        assert used == set(range(6))
    assert postroad("topics", "apply").code == 0
