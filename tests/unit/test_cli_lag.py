"""What a sample of Kafka's answers means, and `postroad lag --watch`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from services.cli.lag_command import _DELAYS, _MEMBERS, _PARTITIONS
from services.cli.main import app
from services.cli.output import Output, OutputFormat
from services.common.kafka.topic_partition import TopicPartition
from services.common.kafka.topics import delay_of
from services.common.operations.lag import monitor
from services.common.operations.lag.domains import DeliveryProgress, UncommittedMail, domain_rows
from services.common.operations.lag.report import remarks, report
from services.common.operations.lag.sampler import LagSample, OldestRecord, StageGroup, StageMember

READS = {"sender": ["mx.ok", "sender.delay.60", "sender.delay.300"]}
MX0, MX1 = TopicPartition("mx.ok", 0), TopicPartition("mx.ok", 1)
D60, D300 = TopicPartition("sender.delay.60", 0), TopicPartition("sender.delay.300", 0)
EVERY = (MX0, MX1, D60, D300)


def sample(at: float = 1000.0, **changes: Any) -> LagSample:
    members = [
        StageMember("m1", "sender-1", "10.0.0.1", frozenset({MX0, D60})),
        StageMember("m2", "sender-2", "10.0.0.2", frozenset({MX1})),
    ]
    fields: dict[str, Any] = {
        "starts": dict.fromkeys(EVERY, 0),
        "ends": {MX0: 100, MX1: 50, D60: 7, D300: 0},
        "groups": {"sender": StageGroup("postroad.sender", "stable", members)},
        "committed": {"sender": {MX0: 90, MX1: 50, D60: 5}},
        "oldest": {("sender", MX0): OldestRecord(970.0, None), ("sender", D60): OldestRecord(950.0, 1012.5)},
    }
    return LagSample(at, **(fields | changes))


def test_lag_counts_uncommitted_records_without_delayed_ones() -> None:
    found = report(READS, sample(), None, partitions=False)
    (stage,) = found["stages"]
    assert (stage["lag"], stage["oldest_waiting_seconds"], stage["delayed"]) == (10, 30.0, 2)
    assert (stage["partitions"], stage["unowned"]) == (3, 0)
    assert [(m["client"], m["partitions"], m["lag"]) for m in stage["members"]] == [
        *(("sender-1", 2, 10), ("sender-2", 1, 0))
    ]
    assert found["delays"][0] == {
        "stage": "sender",
        "topic": "sender.delay.60",
        "delay_seconds": 60,
        "waiting": 2,
        "read": True,
        "next_due_at": "1970-01-01T00:16:52.500Z",
        "next_due_in_seconds": 12.5,
    }
    assert "partitions" not in found


def test_an_unread_delay_topic_counts_while_records_wait_or_no_replica_runs() -> None:
    def shown(now: LagSample) -> tuple[list[str], int]:
        found = report(READS, now, None, partitions=True)
        assert {row["topic"] for row in found["partitions"]} == {
            "mx.ok",
            *(d["topic"] for d in found["delays"]),
        }
        return [row["topic"] for row in found["delays"]], found["stages"][0]["unowned"]

    # sender.delay.300 is left over from earlier settings: no replica should own its partition.
    assert shown(sample()) == (["sender.delay.60"], 0)
    ends = {MX0: 100, MX1: 50, D60: 7, D300: 1}
    assert shown(sample(ends=ends)) == (["sender.delay.60", "sender.delay.300"], 1)
    alone = {"sender": StageGroup("postroad.sender", "empty", [])}
    assert shown(sample(groups=alone)) == (["sender.delay.60", "sender.delay.300"], 4)


def test_remarks_say_what_figures_mean() -> None:
    def row(stage: str, **figures: object) -> dict[str, object]:
        return {"stage": stage, "members": [{}], "lag": 0, "oldest_waiting_seconds": None} | figures

    late = row("status", lag=3, oldest_waiting_seconds=60.0, read_per_second=0.0, members=[])
    [line] = remarks({"stages": [late]})
    assert line.startswith("status is behind: ")
    still = row("sender", lag=84, oldest_waiting_seconds=60.0, read_per_second=0.0)
    [line] = remarks({"stages": [still]})
    assert "--domains" in line
    assert remarks({"stages": [still], "domains": []}) == []
    fine = [
        row("status", lag=3, oldest_waiting_seconds=0.4, read_per_second=9.0),
        row("sender", lag=84, oldest_waiting_seconds=9.0, read_per_second=5.0),
        row("sender", lag=84, oldest_waiting_seconds=9.0, read_per_second=None),
        row("sender", read_per_second=0.0),
        row("sender", lag=84, read_per_second=0.0, members=[]),
    ]
    assert remarks({"stages": fine}) == []


def test_a_past_due_time_is_shown_as_overdue(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"topic": "sender.delay.60", "waiting": 1, "read": True, "next_due_in_seconds": seconds}
        for seconds in (-83.2, -0.5, 0.0, 12.0, None)
    ]
    Output(OutputFormat.TABLE, 80).table(rows, _DELAYS)
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3:] for line in lines] == [
        *(["overdue", "1m23s"], ["overdue", "500ms"], ["0ms"], ["12s"], []),
    ]


def test_the_domains_with_most_claims_come_first() -> None:
    def task(number: int) -> bytes:
        return number.to_bytes(16, "big")

    records = [UncommittedMail(task(n), "hangs.test", 0, 1, 400.0 + n) for n in range(5)]
    records += [
        UncommittedMail(task(10), "quick.test", 0, 1, 990.0),
        UncommittedMail(task(11), "deferred.test", 0, 2, 900.0),
    ]
    records += [
        UncommittedMail(task(12), "again.test", 7, 1, 995.0),
        UncommittedMail(task(13), "claimed.test", 0, 1, 999.0),
    ]
    states = {
        **{task(n): DeliveryProgress("sending", 0, 1) for n in range(3)},
        # It is sent, and its commit waits for a hanging one.
        task(10): DeliveryProgress("sent", 0, 1),
        # Its second attempt has not begun.
        task(11): DeliveryProgress("deferred", 0, 1),
        # It was reopened since: the row is of the epoch before.
        task(12): DeliveryProgress("failed", 0, 3),
        task(13): DeliveryProgress("released", 0, 1),
    }
    rows = domain_rows(records, states, 1000.0)
    assert [tuple(row.values()) for row in rows] == [
        ("hangs.test", 3, 2, 0, 600.0),
        ("again.test", 0, 1, 0, 5.0),
        ("claimed.test", 0, 1, 0, 1.0),
        ("deferred.test", 0, 1, 0, 100.0),
        ("quick.test", 0, 0, 1, None),
    ]


def test_without_a_commit_lag_counts_from_the_first_present_record() -> None:
    found = report(
        READS,
        sample(committed={"sender": {}}, starts={**dict.fromkeys(EVERY, 0), MX0: 95}),
        None,
        partitions=True,
    )
    lags = {(row["topic"], row["partition"]): row["lag"] for row in found["partitions"]}
    assert lags == {("mx.ok", 0): 5, ("mx.ok", 1): 50, ("sender.delay.60", 0): 7}


def test_each_partition_has_its_owner() -> None:
    rows = report(READS, sample(), None, partitions=True)["partitions"]
    assert [(row["topic"], row["client"], row["host"]) for row in rows] == [
        ("mx.ok", "sender-1", "10.0.0.1"),
        ("mx.ok", "sender-2", "10.0.0.2"),
        ("sender.delay.60", "sender-1", "10.0.0.1"),
    ]


def test_rates_come_from_two_samples() -> None:
    before = sample(998.0, committed={"sender": {MX0: 50, MX1: 50}}, ends={MX0: 80, MX1: 50, D60: 0, D300: 0})
    (stage,) = report(READS, sample(), before, partitions=False)["stages"]
    assert (stage["read_per_second"], stage["arriving_per_second"]) == (20.0, 10.0)
    (alone,) = report(READS, sample(), None, partitions=False)["stages"]
    assert (alone["read_per_second"], alone["arriving_per_second"]) == (None, None)


def test_a_fast_clock_makes_no_negative_age() -> None:
    ahead = sample(oldest={("sender", MX0): OldestRecord(1003.0, None)})
    assert report(READS, ahead, None, partitions=False)["stages"][0]["oldest_waiting_seconds"] == 0


def test_a_due_time_beyond_the_calendar_is_cut() -> None:
    far = sample(oldest={("sender", D60): OldestRecord(950.0, 1e15)})
    assert (
        report(READS, far, None, partitions=False)["delays"][0]["next_due_at"] == "9999-12-31T23:59:59.000Z"
    )


def test_delay_topics_are_recognised_by_their_names() -> None:
    assert [delay_of(t) for t in ("sender.delay.60", "mx.ok", "sender.dead", "delay.x")] == [
        60,
        None,
        None,
        None,
    ]


def test_80_columns_show_each_partition_s_end_and_owner(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"stage": "validator", "topic": "validator.delay.600", "partition": 23, "lag": 12_345}
    row |= {"oldest_waiting_seconds": 187_200, "committed": 123_456, "end": 135_801, "host": "10.244.117.213"}
    clients = [f"postroad-validator-6d4f5b7c9d-{name}-1" for name in ("x2x4z", "k9q7w")]
    Output(OutputFormat.TABLE, 80).table([row | {"client": client} for client in clients], _PARTITIONS)
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["STAGE", "TOPIC", "PART", "LAG", "OLDEST", "REPLICA", "END"]
    assert max(map(len, lines)) <= 80
    for line, name in zip(lines, ("x2x4z", "k9q7w"), strict=True):
        assert line.split()[-2].endswith(f"-{name}-1")
        assert line.split()[-1] == "135801"

    member = {"stage": "validator", "host": "10.244.117.213", "partitions": 60, "lag": 12_345}
    member |= {"client": clients[0], "member": "Ab3-Xy9_QmKkNn8xZq2w1A"}
    Output(OutputFormat.TABLE, 45).table([member], _MEMBERS)
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["STAGE", "REPLICA", "PARTITIONS", "LAG"]
    assert line.split()[1].endswith("x2x4z-1")


class _Sampler:
    """A LagSampler that returns or raises the next of `answers`, and at their end Ctrl-C."""

    reads = READS

    def __init__(self, answers: list[LagSample | KafkaException]) -> None:
        self._answers = iter(answers)

    def __enter__(self) -> _Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def sample(self, *, offsets_only: bool = False) -> LagSample:
        answer = next(self._answers, None)
        if answer is None:
            raise KeyboardInterrupt
        if isinstance(answer, KafkaException):
            raise answer
        return answer


def _lag(monkeypatch: pytest.MonkeyPatch, answers: list[LagSample | KafkaException], *options: str) -> object:
    monkeypatch.setattr(monitor, "LagSampler", lambda settings, stages: _Sampler(answers))
    monkeypatch.setattr(monitor, "outbox_lag", lambda engine: {"due": 0, "oldest_due_seconds": None})
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return app(["lag", "--interval", "0", "-o", "jsonl", *options], standalone_mode=False)


def _error(code: int) -> KafkaException:
    return KafkaException(KafkaError(code))


def test_watch_continues_when_kafka_is_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = [_error(KafkaError._TRANSPORT), _error(KafkaError._TRANSPORT), _error(KafkaError.NOT_COORDINATOR)]
    assert _lag(monkeypatch, [sample(), *gone, sample(1010.0)], "--watch") == 130
    written = capsys.readouterr()
    ats = [json.loads(line)["at"] for line in written.out.splitlines()]
    assert ats == ["1970-01-01T00:16:40.000Z", "1970-01-01T00:16:50.000Z"]
    # Each error is said once.
    assert [" does not answer: " in line for line in written.err.splitlines()] == [True, True]


def test_watch_ends_at_an_error_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="uthoriz"):
        _lag(monkeypatch, [sample(), _error(KafkaError.GROUP_AUTHORIZATION_FAILED)], "--watch")
