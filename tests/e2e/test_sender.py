"""The sender of a whole system drains while replies are late, and works while a domain hangs."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from tests.cli import Command
from tests.e2e.pipeline import Pipeline, until
from tests.forms import by_form
from tests.stack import Infra, Stack, further, running

LEASE = "3"
# The long form uses the settings' own times.
HASTY = by_form({"POSTROAD_REVOKE_SECONDS": "1", "POSTROAD_DRAIN_SECONDS": "1"}, {})


@pytest.fixture(scope="module")
def stack(infra: Infra) -> Iterator[Stack]:
    """One system for the tests of this module."""
    with running(
        further(infra, POSTROAD_MAX_IN_FLIGHT="200", POSTROAD_SENDER_DELAYS="2,5", **HASTY)
    ) as system:
        yield system


def metric(stack: Stack, name: str, line: str) -> float:
    """Return the value of one line of a replica's metrics, 0 if it is not there yet."""
    address = stack.env()[f"POSTROAD_HTTP_{name.upper().replace('-', '_')}"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        found = [row for row in answer.read().decode().splitlines() if row.startswith(line)]
    return sum(float(row.rpartition(" ")[2]) for row in found)


def _statuses(pipeline: Pipeline, ids: Iterable[str]) -> set[str]:
    wanted = set(ids)
    return {task.status for task in pipeline.list_all() if task.id in wanted}


def problems(stack: Stack, name: str) -> list[str]:
    """Return the problems that a replica names."""
    address = stack.env()[f"POSTROAD_HTTP_{name.upper().replace('-', '_')}"]
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=10) as answer:
            found: list[str] = json.load(answer)["problems"]
    except urllib.error.HTTPError as error:
        found = json.load(error)["problems"]
    return found


@pytest.mark.timeout(900)
def test_scaling_and_restarts_cut_off_no_mail_that_was_handed_over(stack: Stack) -> None:
    mails, seconds = by_form((24, 3), (200, 25))
    ids: list[str] = []

    def hand_over(mark: str) -> None:
        """Start mails whose replies come later than a revocation or a drain would wait."""
        taken = len(stack.journal())
        emails = [f"slow-{seconds * 1000}@{mark}{n}.ok.test" for n in range(mails // 4)]
        ids.extend(pipeline.create_many(emails, mark))
        until(lambda: len(stack.journal()) >= taken + 6, f"mails are handed over: {mark}", 120)

    with Pipeline(stack) as pipeline:
        hand_over("one")
        stack.scale("sender", 3)
        hand_over("three")
        stack.scale("sender", 1)
        hand_over("again")
        stack.stop("sender-1")
        stack.start("sender-1")
        hand_over("restarted")
        tasks = pipeline.settled(ids, by_form(60, 600))
        assert Counter(task.status for task in tasks.values()) == {"completed": mails}
        assert Counter(pipeline.copies(ids).values()) == {1: mails}
        assert sum(pipeline.doubts(id_) for id_ in ids) == 0
        until(lambda: not any(pipeline.lag().values()), "all committed", 30)


@pytest.mark.timeout(300)
def test_a_domain_that_hangs_blocks_neither_partitions_nor_the_sender(stack: Stack) -> None:
    with Pipeline(stack) as pipeline:
        # Three times what the sender holds in memory, in every partition, ahead of all others.
        stuck = pipeline.create_many(["hang@stuck.ok.test" for _ in range(600)], "stuck")
        until(
            lambda: metric(stack, "sender-1", 'postroad_sender_sessions{state="busy"}') == 15,
            "a domain hangs",
        )
        start = time.monotonic()
        others = pipeline.create_many([f"o{n}@o{n}.ok.test" for n in range(100)], "others")
        tasks = pipeline.settled(others, 60)
        took = time.monotonic() - start
        assert {task.status for task in tasks.values()} == {"completed"}
        assert took < 30
        assert metric(stack, "sender-1", "postroad_sender_crowded_total") > 0
        held = 'postroad_sender_domain_sessions{domain="stuck.ok.test"}'
        assert metric(stack, "sender-1", held) == 15
        postroad = Command({"POSTROAD_ENV_FILE": str(stack.directory / "stack.env")})
        found = postroad("lag", "--stage", "sender", "--domains", "--interval", "0", "-o", "json").json
        assert found["domains"][0]["domain"] == "stuck.ok.test"
        assert found["domains"][0]["sending"] >= 15
        # Some of their events are still being folded.
        until(lambda: _statuses(pipeline, stuck) == {"processing"}, "what is stuck is being processed", 30)
        again = {task.id: task for task in pipeline.list_all()}
        assert {again[id_].attempts for id_ in stuck} == {0}, "to wait for others is no attempt"
        pipeline.sent_once(others)
        # A drain would wait for the mails that hang.
        stack.kill("sender-1")
