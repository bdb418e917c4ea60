"""What a replay decides, alone and while the sender, a cancel and a retry act in between."""

from __future__ import annotations

import contextlib
import json
import math
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postroad.v1 import events_pb2 as pb
from services.cli.command import CommandContext
from services.cli.errors import Failure
from services.cli.output import Output, OutputFormat
from services.cli.replay_command import _finish
from services.cli.replay_results import show_result
from services.cli.times import parse_point
from services.common.addresses import normalise
from services.common.deliveries.decide import (
    IN_DOUBT,
    Cancel,
    Claim,
    Delivery,
    Settled,
    Taken,
    Wait,
    decide,
)
from services.common.events import DECODERS, Undecodable, encode
from services.common.kafka.headers import delayed_headers, parse_delayed_headers
from services.common.kafka.topic_partition import RecordLocation
from services.common.operations.errors import InvalidOption
from services.common.operations.replay.options import (
    ReplayOptions,
    TaskFilter,
    check_options,
    parse_options,
)
from services.common.operations.replay.preview import DistinctTasks
from services.common.operations.replay.records import ReplayedRecord, decode, replayed
from services.common.operations.replay.replay_decision import (
    OVERDUE_US,
    ReplayAction,
    ReplayDecision,
    decide_delayed,
    decide_work,
    wait_for_send_at,
)
from services.common.operations.replay.store import Counts, Replay
from services.common.operations.replay.task_state import StoredDelivery, TaskState, combine, new_task_state
from services.common.rate import Rate
from tests.event_strategies import mail_task
from tests.forms import by_form

ID = bytes(range(16))
NOW = datetime(2026, 3, 1, 12)
NOW_US = 1_772_366_400_000_000
LEASE = timedelta(seconds=20)
NEW_EPOCH = 1_772_366_400_000
DELAYS = {"validator": (5, 30), "sender": (60, 300)}


def ask(
    task: TaskState, *reopen: str, epoch: int = 0, new_epoch: int = NEW_EPOCH, to_sender: bool = True
) -> ReplayDecision:
    return decide_work(
        epoch, task, reopen=set(reopen), new_epoch=new_epoch, now_us=NOW_US, to_sender=to_sender
    )


# --- one record, one task ---


@pytest.mark.parametrize("to_sender", [True, False])
@pytest.mark.parametrize(
    ("status", "reopen", "what", "epoch"),
    [
        ("completed", [], ReplayAction.ALREADY_SENT, 7),
        ("completed", ["failed", "cancelled", "uncertain", "deferred"], ReplayAction.ALREADY_SENT, 7),
        ("failed", [], ReplayAction.SETTLED, 7),
        ("failed", ["cancelled", "uncertain", "deferred"], ReplayAction.SETTLED, 7),
        ("failed", ["failed"], ReplayAction.REOPENED, NEW_EPOCH),
        ("cancelled", [], ReplayAction.SETTLED, 7),
        ("cancelled", ["cancelled", "failed"], ReplayAction.REOPENED, NEW_EPOCH),
        ("uncertain", ["failed"], ReplayAction.SETTLED, 7),
        ("uncertain", ["uncertain"], ReplayAction.REOPENED, NEW_EPOCH),
        ("pending", ["failed"], ReplayAction.REPUBLISH, 7),
        ("processing", ["failed"], ReplayAction.REPUBLISH, 7),
    ],
)
def test_the_action_follows_the_task_s_status(
    status: str, reopen: list[str], what: ReplayAction, epoch: int, to_sender: bool
) -> None:
    assert ask(TaskState(status, "", 7), *reopen, epoch=7, to_sender=to_sender) == ReplayDecision(what, epoch)


def test_a_record_of_an_earlier_epoch_gets_the_task_s_epoch() -> None:
    assert ask(TaskState("pending", "", 7), epoch=0) == ReplayDecision(ReplayAction.REPUBLISH, 7)


def test_a_record_of_a_later_epoch_than_the_row_s_is_republished() -> None:
    assert ask(TaskState("failed", "rejected", 0), epoch=9) == ReplayDecision(ReplayAction.REPUBLISH, 9)
    assert ask(TaskState("failed", "rejected", 0), "failed", epoch=9) == ReplayDecision(
        ReplayAction.REPUBLISH, 9
    )


@pytest.mark.parametrize("what", ReplayAction)
def test_a_scheduled_record_waits_for_its_time(what: ReplayAction) -> None:
    decision = ReplayDecision(what, 5)
    assert wait_for_send_at(decision, 3, 100, 100) == wait_for_send_at(decision, 3, 0, 100) == decision
    assert wait_for_send_at(decision, 3, 101, 100) == (
        ReplayDecision(ReplayAction.WAITS, 3) if what.produces else decision
    )


def test_a_task_that_failed_again_since_this_replay_reopened_it_is_left_out() -> None:
    assert ask(TaskState("failed", "rejected", NEW_EPOCH), "failed").action is ReplayAction.REOPENED_SINCE
    assert ask(TaskState("failed", "rejected", NEW_EPOCH + 1), "failed").action is ReplayAction.REOPENED_SINCE


def test_a_deferred_mail_waits_unless_its_next_attempt_is_lost_or_reopened() -> None:
    later, lost = NOW_US + 60_000_000, NOW_US - OVERDUE_US - 1
    deferred = TaskState("processing", "deferred", 3, deferred=(2, later))
    assert ask(deferred).action is ReplayAction.WAITS
    assert ask(deferred, "failed").action is ReplayAction.WAITS
    assert ask(deferred, "deferred") == ReplayDecision(ReplayAction.NEXT_ATTEMPT, 3, 3)
    assert ask(deferred._replace(deferred=(2, lost))) == ReplayDecision(ReplayAction.NEXT_ATTEMPT, 3, 3)
    # Through the validator, the sender would get it as a first attempt, which is over.
    assert (
        ask(deferred._replace(deferred=(2, lost)), "deferred", to_sender=False).action is ReplayAction.WAITS
    )


@pytest.mark.parametrize(("attempt", "goes_as"), [(0, 0), (1, 0), (2, 2), (5, 5)])
def test_a_later_attempt_of_the_sender_is_republished_as_that_attempt(attempt: int, goes_as: int) -> None:
    works = TaskState("processing", "", 3, attempt=attempt)
    assert ask(works, epoch=3) == ask(works, epoch=0) == ReplayDecision(ReplayAction.REPUBLISH, 3, goes_as)
    assert ask(works, "deferred", epoch=3) == ReplayDecision(ReplayAction.REPUBLISH, 3, goes_as)
    # The validator's attempts are its own.
    assert ask(works, to_sender=False) == ReplayDecision(ReplayAction.REPUBLISH, 3)


@pytest.mark.parametrize(
    ("status", "task_epoch", "due_ms", "what"),
    [
        ("processing", 3, 10, ReplayAction.REPUBLISH),
        ("processing", 3, 11, ReplayAction.WAITS),
        ("processing", 4, 10, ReplayAction.REOPENED_SINCE),
        ("failed", 3, 10, ReplayAction.SETTLED),
        ("failed", 2, 10, ReplayAction.REPUBLISH),
        ("completed", 3, 10, ReplayAction.ALREADY_SENT),
        ("completed", 0, 11, ReplayAction.ALREADY_SENT),
    ],
)
def test_the_action_for_a_delayed_record_follows_its_due_time_and_epoch(
    status: str, task_epoch: int, due_ms: int, what: ReplayAction
) -> None:
    assert decide_delayed(3, TaskState(status, "", task_epoch), due_ms=due_ms, now_ms=10) == ReplayDecision(
        what, 3
    )


# --- a task's state ---


def stored(state: str, epoch: int = 0, attempt: int = 1, reason: str = "") -> StoredDelivery:
    return StoredDelivery(state, epoch, attempt, 55 if state == "deferred" else 0, reason)


@pytest.mark.parametrize(
    ("row", "delivery", "state"),
    [
        (("pending", "", 0), None, ("pending", "", 0)),
        (("processing", "", 0), stored("sent"), ("completed", "", 0)),
        (("failed", "rejected", 0), stored("sent"), ("completed", "", 0)),
        (("completed", "", 0), stored("sending", 5), ("completed", "", 0)),
        (("processing", "", 0), stored("failed", reason="rejected"), ("failed", "rejected", 0)),
        (("processing", "", 0), stored("uncertain", reason=IN_DOUBT), ("uncertain", IN_DOUBT, 0)),
        (("pending", "", 0), stored("cancelled"), ("cancelled", "", 0)),
        (("processing", "deferred", 0), stored("cancelled", reason="deferred"), ("cancelled", "", 0)),
        (("failed", "null_mx", 0), stored("failed", attempt=0, reason="null_mx"), ("failed", "null_mx", 0)),
        (("failed", "rejected", 0), stored("sending", 5), ("processing", "", 5)),
        (("pending", "", 5), stored("failed", 0, reason="rejected"), ("pending", "", 5)),
        (("failed", "null_mx", 0), None, ("failed", "null_mx", 0)),
    ],
)
def test_the_delivery_knows_more_than_a_row_that_lags(
    row: tuple[str, str, int], delivery: StoredDelivery | None, state: tuple[str, str, int]
) -> None:
    assert combine(TaskState(*row), delivery)[:3] == state


@pytest.mark.parametrize(
    ("delivery", "attempt", "deferred"),
    [
        (stored("released", 5, 2), 2, None),
        (stored("sending", 6, 3), 3, None),
        (stored("deferred", 5, 2), 0, (2, 55)),
        (stored("failed", 5, 2), 0, None),
        # The delivery is of an earlier epoch: the task was reopened since.
        (stored("released", 4, 2), 0, None),
    ],
)
def test_the_delivery_says_which_attempt_the_sender_is_at(
    delivery: StoredDelivery, attempt: int, deferred: tuple[int, int] | None
) -> None:
    state = combine(TaskState("processing", "", 5), delivery)
    assert (state.attempt, state.deferred) == (attempt, deferred)


def test_a_task_without_a_row_is_pending() -> None:
    task = mail_task(1)
    seen = new_task_state(pb.TaskCreated(task=task, epoch=4))
    assert (seen.status, seen.epoch, seen.recipient) == ("pending", 4, task.email)
    assert seen.labels == dict(task.labels)
    assert new_task_state(pb.MailSent(id=ID, epoch=4)) == TaskState("pending", "", 4)


# --- against the sender ---


def claim(epoch: int, attempt: int, number: int) -> Claim:
    return Claim(ID, epoch, attempt, number.to_bytes(16, "big"), "<m@x>")


class Task:
    """One task: its delivery by the claims' own rules, its row in `tasks`, the records about it.

    Policy `hold`. `row` follows what a cancel and a retry write at once, and what the sender settles when
    the fold comes to it. Records are never gone: each may be handled again at any time.
    """

    def __init__(self) -> None:
        self.delivery: Delivery | None = None
        self.row = TaskState("pending", "", 0)
        self.records = [(0, 1)]
        self.number = 0
        self.clock = NOW
        self.sent = self.asked = 0
        # Whether somebody asked for it again since it was settled.
        self.wanted = True
        self.taken_unasked = 0
        self.dead = b""

    def handle(self, record: tuple[int, int]) -> None:
        self.number += 1
        before = self.delivery
        answer, row = decide(before, claim(*record, self.number), self.clock, LEASE, True)
        if isinstance(answer, Taken):
            over = before is not None and before.state in ("failed", "uncertain", "cancelled", "sent")
            self.taken_unasked += over and not self.wanted
        elif isinstance(answer, Settled) and row is not None:
            self._over()
        self.delivery = row or self.delivery

    def end(self, state: str) -> None:
        row = self.delivery
        if row is None or row.state != "sending" or row.owner == self.dead:
            return
        # A mail that may have gone out counts as sent.
        self.sent += state in ("sent", "uncertain", "dead")
        if state == "dead":
            self.dead = row.owner
            self.clock += LEASE * 2
            return
        reason = IN_DOUBT if state == "uncertain" else ""
        self.delivery = row._replace(state=state, reason=reason, next_attempt_at=NOW_US)  # type: ignore[arg-type]
        if state == "deferred":
            self.records.append((row.epoch, row.attempt + 1))
        else:
            self._over()

    def fold(self) -> None:
        self.row = self.state()

    def state(self) -> TaskState:
        row = self.delivery
        delivery = (
            None
            if row is None
            else StoredDelivery(row.state, row.epoch, row.attempt, row.next_attempt_at, row.reason)
        )
        return combine(self.row, delivery)

    def cancel(self) -> None:
        self.number += 1
        request = Cancel(ID, self.row.epoch, self.number.to_bytes(16, "big"))
        answer, row = decide(self.delivery, request, self.clock, LEASE, True)
        if isinstance(answer, Wait):
            return
        self.delivery = row or self.delivery
        if row is not None:
            self._over()
        self.fold()

    def retry(self) -> None:
        self.fold()
        if self.row.status in ("failed", "uncertain", "cancelled"):
            epoch = NEW_EPOCH + 1_000_000 + self.number
            self.row = TaskState("pending", "", max(epoch, self.row.epoch + 1))
            self.records.append((self.row.epoch, 1))
            self._ask()

    def look(self, record: tuple[int, int], reopen: set[str], lags: bool) -> tuple[int, int] | None:
        """Return what a replay would produce for a record. `lags`: it sees the row without the delivery."""
        task = self.row if lags else self.state()
        decision = decide_work(
            record[0], task, reopen=reopen, new_epoch=NEW_EPOCH + self.number, now_us=NOW_US, to_sender=True
        )
        if decision.action is ReplayAction.REOPENED:
            self._ask()
        return (decision.epoch, decision.attempt or 1) if decision.action.produces else None

    def _over(self) -> None:
        self.wanted = False

    def _ask(self) -> None:
        self.asked += 1
        self.wanted = True


WHAT = ["handle", "sent", "failed", "deferred", "uncertain", "dead", "fold", "cancel", "retry"]
WHAT += ["handle", "look", "look", "lag", "produce", "produce"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(WHAT),
        st.integers(0, 9),
    ),
    max_size=40,
)


def walk(steps: list[tuple[str, int]], reopen: set[str]) -> Task:
    task = Task()
    # Records that a replay has decided about and not yet produced.
    held: list[tuple[int, int]] = []
    for step, n in steps:
        record = task.records[n % len(task.records)]
        match step:
            case "handle":
                task.handle(record)
            case "fold":
                task.fold()
            case "cancel":
                task.cancel()
            case "retry":
                task.retry()
            case "look" | "lag":
                if made := task.look(record, reopen, step == "lag"):
                    held.append(made)
            case "produce":
                if held:
                    task.records.append(held.pop(n % len(held)))
            case _:
                task.end(step)
    return task


@settings(max_examples=by_form(300, 2000), deadline=None)
@given(STEPS)
def test_a_replay_never_sends_a_task_that_ended_before_or_after_its_decision(
    steps: list[tuple[str, int]],
) -> None:
    task = walk(steps, set())
    assert task.taken_unasked == 0
    assert task.sent <= 1 + task.asked


@settings(max_examples=by_form(300, 2000), deadline=None)
@given(STEPS, st.sets(st.sampled_from(["failed", "cancelled", "uncertain", "deferred"])))
def test_each_further_mail_has_a_request(steps: list[tuple[str, int]], reopen: set[str]) -> None:
    task = walk(steps, reopen)
    assert task.sent <= 1 + task.asked


@settings(max_examples=by_form(300, 2000), deadline=None)
@given(STEPS)
def test_a_replay_restarts_any_open_task(steps: list[tuple[str, int]]) -> None:
    """With `--reopen deferred`, and once no sender holds its claim: all of its records may be lost."""
    task = walk(steps, set())
    if task.delivery is not None and task.delivery.state == "sending":
        task.end("dead")
    task.row = task.state()
    record = task.look((0, 1), {"deferred"}, False)
    if task.row.status in ("pending", "processing"):
        assert record is not None
        before = task.delivery
        task.handle(record)
        assert task.delivery != before
    else:
        assert record is None


def test_a_new_epoch_for_a_working_task_would_send_a_cancelled_mail() -> None:
    task = Task()
    looked = (NEW_EPOCH, 1)
    assert task.look((0, 1), set(), False) == (0, 1)
    task.cancel()
    task.handle(looked)
    assert task.taken_unasked == 1, "the reason why such a task keeps its epoch"


@pytest.mark.parametrize("attempt", [1, 2, 4])
@pytest.mark.parametrize("state", [None, "released", "sending", "deferred"])
def test_a_stuck_task_is_claimed_again(state: Any, attempt: int) -> None:
    """The lease of a `sending` delivery has ended."""
    row = None
    if state is not None:
        due = NOW_US - 2 * OVERDUE_US
        row = Delivery(ID, state, 5, attempt, 0, b"x" * 16, NOW, 0, due, "", "", "", "<m@x>")
    delivery = row and StoredDelivery(row.state, row.epoch, row.attempt, row.next_attempt_at, row.reason)
    decision = ask(combine(TaskState("processing", "", 5), delivery), epoch=0)
    answer, _ = decide(row, claim(decision.epoch, decision.attempt or 1, 1), NOW + LEASE, LEASE, False)
    assert isinstance(answer, Taken)


# --- the records ---


def record(event: Any, topic: str, *headers: tuple[str, bytes]) -> ReplayedRecord:
    out = encode(event, "api", b"00-1-2-01")
    return ReplayedRecord(topic, 3, 17, out.key, out.value, [*out.headers, *headers])


def test_a_replayed_record_is_unchanged_and_names_its_replay() -> None:
    read = record(pb.MxOk(task=mail_task(1), attempt=2, at_us=9), "mx.ok", ("replay-id", b"an earlier one"))
    out = replayed(read, decode(read), ReplayDecision(ReplayAction.REPUBLISH, 0), "r2", "sender.delay.60")
    assert (out.topic, out.key, out.value) == ("mx.ok", read.key, read.value)
    assert [h for h in out.headers if h[0] == "replay-id"] == [("replay-id", b"r2")]
    assert [h for h in out.headers if h[0] != "replay-id"] == (read.headers or [])[:-1]


def test_all_replays_of_an_epoch_encode_a_reopened_task_alike() -> None:
    events = [
        pb.TaskCreated(task=mail_task(1), at_us=9, send_at_us=4),
        pb.TaskCreated(task=mail_task(1), epoch=8),
    ]
    made = []
    for event in events:
        read = record(event, "task.created")
        made.append(
            replayed(
                read, decode(read), ReplayDecision(ReplayAction.REOPENED, NEW_EPOCH), "r", "sender.delay.60"
            )
        )
    assert made[0] == made[1]
    assert DECODERS["task.created"](made[0].value) == pb.TaskCreated(
        task=mail_task(1), epoch=NEW_EPOCH, at_us=NEW_EPOCH * 1000
    )
    assert ("traceparent", b"00-1-2-01") in made[0].headers


def test_a_next_attempt_is_a_delayed_record_that_is_due() -> None:
    read = record(pb.MxOk(task=mail_task(1), epoch=5, at_us=9), "mx.ok")
    out = replayed(
        read, decode(read), ReplayDecision(ReplayAction.NEXT_ATTEMPT, 5, 3), "r", "sender.delay.60"
    )
    assert (out.topic, out.value) == ("sender.delay.60", read.value)
    back = parse_delayed_headers(out.headers)
    assert (back.due_at_ms, back.attempt, back.origin) == (0, 3, RecordLocation("mx.ok", 3, 17))


def test_a_later_attempt_is_a_delayed_record_in_the_task_s_epoch() -> None:
    read = record(pb.MxOk(task=mail_task(1), at_us=9), "mx.ok")
    out = replayed(read, decode(read), ReplayDecision(ReplayAction.REPUBLISH, 5, 2), "r", "sender.delay.60")
    assert out.topic == "sender.delay.60"
    back = parse_delayed_headers(out.headers)
    assert (back.due_at_ms, back.attempt, back.origin) == (0, 2, RecordLocation("mx.ok", 3, 17))
    assert DECODERS["mx.ok"](out.value) == pb.MxOk(task=mail_task(1), epoch=5, at_us=5000)


def test_a_delayed_record_is_decoded_by_its_origin() -> None:
    origin = RecordLocation("mx.ok", 1, 2)
    headers = delayed_headers([], origin=origin, attempt=4, cause="c", due_at_ms=77)
    read = record(pb.MxOk(task=mail_task(1)), "sender.delay.60", *headers)
    seen = decode(read)
    assert isinstance(seen.event, pb.MxOk)
    assert seen.delayed is not None
    assert (seen.delayed.attempt, seen.delayed.due_at_ms) == (4, 77)
    with pytest.raises(Undecodable, match="not read by validator"):
        decode(read._replace(topic="validator.delay.5"))
    with pytest.raises(Undecodable):
        decode(read._replace(headers=[]))


@given(st.binary(max_size=60), st.sampled_from(sorted(DECODERS)))
def test_an_undecodable_record_raises_undecodable(value: bytes, topic: str) -> None:
    with contextlib.suppress(Undecodable):
        assert decode(ReplayedRecord(topic, 0, 0, b"", value, None)).event is not None


# --- options ---


def test_a_task_filter_matches_when_all_its_kinds_match() -> None:
    task = TaskState("failed", "rejected", 0, "Ada@Good.test", "good.test", {"team": "blue", "n": "1"})
    asked = ReplayOptions(
        "mx.ok",
        status=("failed", "pending"),
        reason=("rejected",),
        recipient=("ada@good.TEST",),
        domain=("GOOD.test",),
        id=(str(uuid.UUID(bytes=ID)),),
        label=("team=blue", "n=1"),
    )
    assert asked.task_filter().matches(ID, task)
    assert TaskFilter().matches(ID, task)
    assert not asked.task_filter().matches(bytes(16), task)
    for other in (
        task._replace(status="cancelled"),
        task._replace(reason=""),
        task._replace(recipient="eve@good.test"),
        task._replace(domain="bad.test"),
        task._replace(labels={"team": "blue"}),
        task._replace(labels={"team": "red", "n": "1"}),
    ):
        assert not asked.task_filter().matches(ID, other)


@pytest.mark.parametrize(
    ("email", "asked"),
    [
        ("ada@bücher.example", "ada@bücher.example"),
        ("ada@bücher.example", "Ada@BÜCHER.example"),
        ("ada@bücher.example", "ada@xn--bcher-kva.example"),
        ("ada@xn--bcher-kva.example", "ada@bücher.example"),
        ("jos\u00e9@good.example", "jose\u0301@good.example"),
        ("ada@straße.example", "ada@xn--strae-oqa.example"),
        ("ada@例え.example", "ada@例え。example"),
    ],
)
def test_recipients_and_domains_are_found_in_any_form_that_the_api_takes(email: str, asked: str) -> None:
    recipient, domain = normalise(email)
    task = TaskState("failed", "rejected", 0, recipient, domain)
    assert check_options(ReplayOptions("mx.ok", recipient=(asked,))).task_filter().matches(ID, task)
    assert (
        check_options(ReplayOptions("mx.ok", domain=(asked.partition("@")[2],)))
        .task_filter()
        .matches(ID, task)
    )


def test_another_domain_with_the_same_case_folding_does_not_match() -> None:
    recipient, domain = normalise("ada@strasse.example")
    task = TaskState("failed", "rejected", 0, recipient, domain)
    for asked in (
        ReplayOptions("mx.ok", recipient=("ada@straße.example",)),
        ReplayOptions("mx.ok", domain=("straße.example",)),
    ):
        assert not check_options(asked).task_filter().matches(ID, task)


def test_checked_options_have_the_form_that_tasks_have() -> None:
    asked = check_options(
        ReplayOptions("mx.ok", recipient=("ada@xn--bcher-kva.example",), domain=("Bücher.example",))
    )
    assert (asked.recipient, asked.domain) == (("ada@bücher.example",), ("xn--bcher-kva.example",))
    assert check_options(parse_options(asked.as_json())) == asked


def test_a_replay_with_a_refused_record_fails(capsys: pytest.CaptureFixture[str]) -> None:
    replay = Replay("r", "mx.ok", {}, NEW_EPOCH, {}, Counter({("pending", "", "again"): 3}))
    _finish(CommandContext({"output": "json"}), replay)
    assert json.loads(capsys.readouterr().out)["produced"] == 3
    replay.counts["pending", "", "refused"] = 2
    with pytest.raises(Failure, match="2 records could not be produced") as failed:
        _finish(CommandContext({"output": "json"}), replay)
    assert failed.value.code == 1
    shown = json.loads(capsys.readouterr().out)
    assert (shown["records"], shown["produced"]) == (5, 3)


def test_a_preview_counts_records_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    kind, other = ("failed", "rejected", "reopened"), ("completed", "", "already sent")
    tasks = DistinctTasks(3)
    tasks.add([(kind, b"a"), (kind, b"a"), (kind, b"b"), (other, b"c")])
    counts: Counts = Counter({kind: 3, other: 1})
    show_result(Output(OutputFormat.TABLE), None, counts, "dry run", tasks.counts())
    shown = capsys.readouterr()
    assert "Of 4 records, 3 records of 2 tasks would be produced." in shown.err
    assert "TASKS" in shown.out
    show_result(Output(OutputFormat.JSON), None, counts, "dry run", tasks.counts())
    assert {row["what"]: row["tasks"] for row in json.loads(capsys.readouterr().out)["counts"]} == {
        "reopened": 2,
        "already sent": 1,
    }
    # More tasks than it counts.
    tasks.add([(kind, b"d")])
    assert tasks.counts() is None
    show_result(Output(OutputFormat.TABLE), None, counts, "dry run", tasks.counts())
    assert "Of 4 records, 3 records would be produced." in capsys.readouterr().err


def test_the_former_name_of_not_selected_is_still_read() -> None:
    assert ReplayAction("not meant") is ReplayAction.NOT_SELECTED
    assert ReplayAction.NOT_SELECTED.value == "not selected"
    with pytest.raises(ValueError, match="sideways"):
        ReplayAction("sideways")


def test_options_survive_storing() -> None:
    asked = ReplayOptions("mx.ok", "5", "-2h", ("failed",), label=("a=b",), reopen=("failed",), rate=7.5)
    assert parse_options(asked.as_json()) == asked
    assert parse_options({**asked.as_json(), "status": ["failed"], "a later version's": 1}) == asked


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (ReplayOptions("mail.lost"), "topic"),
        (ReplayOptions("sender.delay.x"), "topic"),
        (ReplayOptions("sender.delay.060"), "topic"),
        (ReplayOptions("status.delay.60"), "topic"),
        (ReplayOptions("sender.dead"), "topic"),
        (ReplayOptions("mx.ok", status=("done",)), "status"),
        (ReplayOptions("mx.ok", reopen=("completed",)), "reopen"),
        (ReplayOptions("mail.failed", reopen=("failed",)), "reopen"),
        (ReplayOptions("sender.delay.60", reopen=("deferred",)), "reopen"),
        (ReplayOptions("mx.ok", id=("17",)), "id"),
        (ReplayOptions("mx.ok", label=("team",)), "label"),
        (ReplayOptions("mx.ok", label=("=blue",)), "label"),
        (ReplayOptions("mx.ok", label=("team=blue", "team=red")), "label"),
        (ReplayOptions("mx.ok", recipient=("good.test",)), "recipient: 'good.test'"),
        (ReplayOptions("mx.ok", recipient=("Ada <ada@good.test>",)), "recipient"),
        (ReplayOptions("mx.ok", recipient=("ada@slow.example.",)), "recipient"),
        (ReplayOptions("mx.ok", recipient=("",)), "recipient"),
        (ReplayOptions("mx.ok", domain=("slow.example.",)), "domain: 'slow.example.'"),
        (ReplayOptions("mx.ok", domain=("good.test", "@good.test")), "domain"),
        (ReplayOptions("mx.ok", domain=("",)), "domain"),
        (ReplayOptions("mx.ok", rate=0), "rate"),
        (ReplayOptions("mx.ok", rate=math.nan), "rate"),
        (ReplayOptions("mx.ok", rate=math.inf), "rate"),
    ],
)
def test_an_invalid_option_is_named(asked: ReplayOptions, named: str) -> None:
    with pytest.raises(InvalidOption, match=f"^{named}"):
        check_options(asked)


@pytest.mark.parametrize("topic", ["task.created", "task.cancelled", "sender.delay.300", "validator.delay.5"])
def test_event_topics_and_delay_topics_can_be_replayed(topic: str) -> None:
    assert check_options(ReplayOptions(topic)) == ReplayOptions(topic)


def test_points() -> None:
    now = datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert [parse_point("--from", text, now) for text in ("start", "end", "0", "17")] == [
        "start",
        "end",
        0,
        17,
    ]
    assert parse_point("--from", "2026-01-31T10:00:00Z", now) == now - timedelta(hours=2)
    assert parse_point("--from", "-2h", now) == now - timedelta(hours=2)
    for text in ("", "begin", "1e3", "²", "9" * 30):
        with pytest.raises(Failure, match=r"^--to"):
            parse_point("--to", text, now)


# --- the rate ---


@given(
    st.floats(0.5, 5000),
    st.integers(1, 50),
    st.lists(st.floats(0, 2), min_size=1, max_size=200),
)
def test_no_period_has_more_than_the_rate_and_a_burst(rate: float, burst: int, gaps: list[float]) -> None:
    pace, now, went = Rate(rate, burst), 1000.0, []
    for gap in gaps:
        now += gap / rate
        now += pace.wait(now)
        pace.took(now)
        went.append(now)
    for first in range(len(went)):
        for last in range(first, len(went)):
            assert last - first + 1 <= burst + rate * (went[last] - went[first]) + 1e-3


def test_a_rate_waits_no_longer_than_it_must() -> None:
    pace, now = Rate(10, 1), 0.0
    for _ in range(21):
        now += pace.wait(now)
        pace.took(now)
    assert now == pytest.approx(2.0)
    with pytest.raises(ValueError, match="never end"):
        Rate(0)
