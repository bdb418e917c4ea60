"""The plan: it depends on the seed only, has every kind of fault, and leaves nothing broken."""

from __future__ import annotations

from itertools import pairwise

import pytest

from deploy.local.state import SERVICES
from tests.chaos.plan import REPLICAS, TARGETS, plan
from tests.chaos.recipients import end_of
from tests.chaos.recovery import partition


def test_a_plan_is_a_function_of_its_seed() -> None:
    assert plan(7, 600) == plan(7, 600)
    assert plan(7, 600) != plan(8, 600)


def test_five_runs_of_ten_minutes_have_every_kind_of_fault_for_every_target() -> None:
    faults = [fault for seed in range(1, 6) for fault in plan(seed, 600)]
    kinds = {(fault.kind, fault.target.partition("-")[0]) for fault in faults}
    for name in (*SERVICES, "mysql", "kafka"):
        assert {("kill", name), ("freeze", name), ("restart", name)} <= kinds
    for link in ("mysql", "smtp", "clients", "kafka"):
        assert {("reset", link), ("blackhole", link), ("slow", link)} <= kinds
    assert {("full", "mysql"), ("full", "kafka"), ("roll", "services"), ("mail", "catcher")} <= kinds
    assert {fault.target for fault in faults if fault.kind == "kill"} >= {"kafka-1", "kafka-2", "kafka-3"}


@pytest.mark.parametrize("seed", range(20))
def test_a_run_of_ten_minutes_has_each_kind_at_least_once(seed: int) -> None:
    done = {fault.kind for fault in plan(seed, 600)}
    assert done >= {
        "kill",
        "freeze",
        "restart",
        "reset",
        "blackhole",
        "slow",
        "mail",
        "servfail",
        "full",
        "roll",
        "scale",
    }


@pytest.mark.parametrize("seed", range(20))
def test_every_fault_ends_in_time_and_overlaps_no_fault_that_is_alone(seed: int) -> None:
    faults = plan(seed, 300)
    assert faults
    assert all(fault.at + fault.seconds <= 300 for fault in faults)
    others = [fault for fault in faults if fault.kind != "scale"]
    for before, after in pairwise(others):
        if before.alone and after.alone:
            assert after.at >= before.at + before.seconds + 5
        # Two overlapping faults have different targets, since the end of one would end the other too.
        if after.at < before.at + before.seconds:
            assert after.target != before.target
    for fault in faults:
        if fault.kind == "freeze":
            assert 5 <= fault.seconds <= 20 or not fault.alone
        if fault.kind == "scale":
            least, most = REPLICAS[fault.target]
            assert least <= int(fault.detail) <= most


def test_a_plan_has_faults_of_the_given_targets_only() -> None:
    assert {fault.target for fault in plan(1, 600, ["mysql"])} == {"mysql"}
    assert plan(1, 600, []) == []
    with pytest.raises(ValueError, match="moon"):
        plan(1, 600, ["moon"])
    assert set(TARGETS) > {"disk", "roll"}


def test_the_recipient_says_how_a_task_must_end() -> None:
    assert end_of("u1@d1.ok.test") == end_of("drop-after+1@d1.ok.test") == "completed"
    assert end_of("reject5+1@d1.ok.test") == end_of("u1@nowhere.test") == "failed"


def test_a_task_has_the_partition_that_kafka_s_clients_choose() -> None:
    # The partitions that the Java client chooses among 12 for these 16 bytes.
    assert partition("01a20d80-e37c-76d0-8ea6-9dd8e38648d4") == 3
    assert partition("01a20d80-e352-7b81-a8de-e2bdc4657c33") == 1
