"""Topics get more partitions while tasks are under way."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

from services.common.kafka.topics import MX_OK
from tests.cli import Command
from tests.e2e.pipeline import Pipeline, until
from tests.forms import by_form
from tests.groups import Offsets
from tests.stack import Stack

# The stages' producers use the new partitions within five minutes; a restart is faster.
RESTARTED = by_form(("validator",), ("api", "validator", "status"))
TASKS = by_form(15, 60)


def test_growing_under_load_loses_and_repeats_nothing(stack: Stack) -> None:
    """Keys move to other partitions while tasks are in every state, also deferred."""
    prefix, env = stack.names.prefix, stack.env()
    now = int(env["POSTROAD_PARTITIONS"])
    grown = now + 3
    postroad = Command(
        {
            "POSTROAD_ENV_FILE": str(stack.directory / "stack.env"),
            "POSTROAD_PARTITIONS": str(grown),
            **stack.topics_user,
        }
    )
    refused = postroad("topics", "apply")
    assert (refused.code, refused.out) == (1, "")
    assert f"differs {prefix}mx.ok: {now} partitions, wanted {grown}" in refused.err.splitlines()
    no = postroad.on_terminal("topics", "apply", "--grow", typed="n\n")
    assert (no.code, no.out) == (1, "")
    *listed, last = no.err.splitlines()
    assert f"grow {prefix}mx.ok from {now} to {grown} partitions, for good" in listed
    assert last == f"Change {len(listed)} topics? [y/N] postroad: nothing was done"

    with Pipeline(stack) as pipeline, Offsets(stack.kafka, "e2e-reader") as reader:

        def used() -> set[int]:
            bounds = reader.bounds(reader.partitions([prefix + MX_OK]))
            return {partition for (_, partition), (_, end) in bounds.items() if end}

        ids: list[str] = []
        enough = threading.Event()

        def load() -> None:
            number = 0
            while not enough.is_set():
                kind = "greylist" if number % 3 == 0 else "x"
                ids.append(pipeline.create_surely(f"{kind}+grow{number}@good.test", f"grow-{number}"))
                number += 1
                time.sleep(0.12)

        def deferred() -> bool:
            under_way = pipeline.list_all(status=["processing"])
            return any(task.attempts for task in under_way if task.id in ids)

        thread = threading.Thread(target=load)
        thread.start()
        try:
            until(lambda: len(ids) > TASKS and deferred(), "under load")
            # New partitions have records before their reader knows them.
            with stack.frozen("sender-1"):
                asked = time.time()
                done = postroad("topics", "apply", "--grow", "--yes", "-o", "json")
                assert done.code == 0, done.err
                assert {row["state"] for row in done.json} == {"grown"}
                topics = ("task.created", "mx.ok", "sender.delay.2", "sender.dead")
                assert {row["topic"] for row in done.json} >= {prefix + topic for topic in topics}
                for service in RESTARTED:
                    stack.stop(f"{service}-1")
                    stack.start(f"{service}-1")
                until(lambda: used() == set(range(grown)), "all partitions are used")
        finally:
            enough.set()
            thread.join(60)
        pipeline.settled(ids, 120)
        pipeline.sent_once(ids)
        until(lambda: not any(pipeline.lag().values()), "no lag")
        assert any(_waited(pipeline, id_, asked) for id_ in ids), "no task was deferred when the topics grew"
    assert postroad("topics", "apply").code == 0


def _waited(pipeline: Pipeline, id_: str, at: float) -> bool:
    """Return whether the task was deferred before this time (Unix seconds) and went on after it."""
    steps = [(step.kind, step.at.ToNanoseconds() / 1e9) for step in pipeline.get(id_).timeline]
    return any(kind == "deferred" and before < at < after for (kind, before), (_, after) in pairwise(steps))
