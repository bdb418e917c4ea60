"""The claims in SQL, on each database server: the rules of decide.py, and races."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine

from services.common.database.bulk import execute_rows
from services.common.database.engine import make_engine
from services.common.deliveries.decide import (
    IN_DOUBT,
    Cancel,
    Claim,
    Delivery,
    DeliveryState,
    Settled,
    Stale,
    Taken,
    Wait,
    decide,
    released_row,
)
from services.common.deliveries.rows import COLUMNS, owner_tokens, store_rows
from services.common.deliveries.settlement import Settlement
from services.sender.claims import Claims
from tests import forked  # noqa: F401  (what the fork server has imported already)
from tests.claimers import claim_all, everyone
from tests.forms import by_form
from tests.stack import Infra

LEASE = 20.0
LONG_AGO = datetime(2001, 2, 3, 4, 5, 6, 7)
FAR_AWAY = datetime(2099, 1, 1)

token = owner_tokens()


def new_id() -> bytes:
    return os.urandom(16)


def claim(task_id: bytes, epoch: int = 0, attempt: int = 1) -> Claim:
    return Claim(task_id, epoch, attempt, token(), "<id@a.test>")


def rows_of(engine: Engine) -> dict[bytes, Delivery]:
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(f"SELECT {COLUMNS} FROM deliveries").all()
    return {row[0]: Delivery(*row) for row in rows}


def put(engine: Engine, rows: Sequence[Delivery]) -> None:
    with engine.begin() as connection:
        execute_rows(connection, f"INSERT INTO deliveries ({COLUMNS}) VALUES", rows)


def clock(engine: Engine) -> datetime:
    with engine.connect() as connection:
        now: datetime = connection.exec_driver_sql("SELECT UTC_TIMESTAMP(6)").scalar_one()
    return now


def taken(answer: object) -> Taken:
    assert isinstance(answer, Taken), answer
    return answer


def sent(row: Delivery, reply: str = "250 2.0.0 ok") -> Delivery:
    return row._replace(state="sent", settled_at=1_700_000_000_000_001, reply=reply, relay="mx.test:25")


def expire(engine: Engine) -> None:
    """End all leases."""
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE deliveries SET lease_until = %s", (LONG_AGO,))


@pytest.fixture
def claims(server: Infra, database_url: str) -> Iterator[Claims]:
    engine = make_engine(server.as_user("sender", database_url))
    yield Claims(engine, LEASE, hold=False)
    engine.dispose()


def test_a_task_without_a_delivery_is_taken_under_a_lease_of_the_databases_clock(
    engine: Engine, claims: Claims
) -> None:
    requests = [claim(new_id(), epoch=3, attempt=2) for _ in range(7)]
    before, since = clock(engine), time.monotonic()
    answers = claims.claim(requests)
    after = clock(engine)
    rows = rows_of(engine)
    assert len(rows) == 7
    for request, answer in zip(requests, answers, strict=True):
        row = rows[request.task_id]
        assert taken(answer).row == row._replace(lease_until=taken(answer).row.lease_until)
        assert (row.state, row.epoch, row.attempt, row.owner) == ("sending", 3, 2, request.owner)
        assert row.message_id == "<id@a.test>"
        assert before <= row.lease_until - timedelta(seconds=LEASE) <= after
        assert since <= taken(answer).since <= time.monotonic()


# One call with every state, every lease, and every relation of record to row.
STATES: tuple[DeliveryState, ...] = (
    "sending",
    "released",
    "deferred",
    "failed",
    "sent",
    "uncertain",
    "cancelled",
)


def every_case() -> list[tuple[Delivery, Claim | Cancel]]:
    cases: list[tuple[Delivery, Claim | Cancel]] = []
    for state in STATES:
        for until in (LONG_AGO, FAR_AWAY):
            for reason in ("", IN_DOUBT):
                for epoch, attempt in ((4, 9), (5, 1), (5, 2), (5, 3), (6, 1)):
                    task_id = new_id()
                    row = Delivery(
                        task_id,
                        state,
                        5,
                        2,
                        1,
                        token(),
                        until,
                        17,
                        18,
                        reason,
                        "451 no",
                        "r:25",
                        "<x@a.test>",
                    )
                    cases.append((row, claim(task_id, epoch, attempt)))
                    other = new_id()
                    cases.append((row._replace(task_id=other), Cancel(other, epoch, token())))
    return cases


@pytest.mark.parametrize("hold", [False, True])
def test_the_rows_obey_the_rules_whatever_they_contain(engine: Engine, hold: bool) -> None:
    cases = every_case()
    random.Random(3).shuffle(cases)
    put(engine, [row for row, _ in cases])
    before = clock(engine)
    answers = Claims(engine, LEASE, hold).claim([request for _, request in cases])
    after = clock(engine)
    rows = rows_of(engine)
    for (row, request), answer in zip(cases, answers, strict=True):
        expected, write = decide(row, request, before, timedelta(seconds=LEASE), hold)
        found = rows[row.task_id]
        slack = after - before
        if isinstance(answer, Wait):
            assert isinstance(expected, Wait)
            assert 0 <= expected.seconds - answer.seconds <= slack.total_seconds()
            assert found == row
            continue
        assert type(answer) is type(expected)
        if isinstance(answer, Stale):
            assert found == row
            continue
        # The times are the database's; everything else follows the rule.
        wanted = write or row
        assert wanted.lease_until <= found.lease_until <= wanted.lease_until + slack
        assert 0 <= found.settled_at - wanted.settled_at <= slack / timedelta(microseconds=1)
        assert found == wanted._replace(lease_until=found.lease_until, settled_at=found.settled_at)
        assert not isinstance(answer, Taken | Settled) or answer.row == found
        if isinstance(answer, Taken) and isinstance(expected, Taken):
            assert (answer.doubtful, answer.earlier) == (expected.doubtful, expected.earlier)


def test_one_call_may_claim_a_task_more_than_once(engine: Engine, claims: Claims) -> None:
    one, two = new_id(), new_id()
    answers = claims.claim([claim(one), claim(two), claim(one), Cancel(two, 0, token()), claim(one, 1)])
    assert [type(answer) for answer in answers] == [Taken, Taken, Wait, Wait, Wait]
    three = new_id()
    cancelled, late = claims.claim([Cancel(three, 0, token()), claim(three)])
    assert isinstance(cancelled, Settled)
    assert isinstance(late, Settled)
    assert late.row.state == rows_of(engine)[three].state == "cancelled"


def test_a_claim_that_is_repeated_after_a_lost_answer_is_still_taken(engine: Engine, claims: Claims) -> None:
    requests = [claim(new_id()) for _ in range(3)]
    claims.claim(requests)
    expire(engine)
    answers = [taken(answer) for answer in claims.claim(requests)]
    assert not any(answer.doubtful for answer in answers)
    assert all(row.lease_until > clock(engine) for row in rows_of(engine).values())
    doubtful = claims.claim([claim(request.task_id) for request in requests])
    assert all(isinstance(answer, Wait) for answer in doubtful)


def test_a_claim_released_before_its_doubt_is_published_is_taken_as_before(
    engine: Engine, claims: Claims
) -> None:
    ended = [
        Delivery(
            new_id(), state, 5, 2, 1, token(), LONG_AGO, 17, 18, IN_DOUBT, "451 no", "r:25", "<x@a.test>", 0
        )
        for state in ("deferred", "sending", "released")
    ]
    ended[1] = ended[1]._replace(reason="")
    put(engine, ended)
    first = [taken(answer) for answer in claims.claim([claim(row.task_id, 5, 3) for row in ended])]
    wishes = [released_row(answer) for answer in first]
    for _ in range(2):
        assert claims.store(wishes) == [Settlement.STORED] * 3
        rows = rows_of(engine)
        assert [rows[row.task_id]._replace(lease_until=row.lease_until) for row in wishes] == wishes
    again = [taken(answer) for answer in claims.claim([claim(row.task_id, 5, 3) for row in ended])]
    for before, after in zip(first, again, strict=True):
        assert after.doubtful == before.doubtful
        for row in (before.row, after.row):
            assert (row.attempt, row.doubts_in_all, row.doubts_in_epoch) == (
                3,
                1 + (before is not first[2]),
                1 - (before is first[2]),
            )
    assert again[0].earlier is not None
    assert again[0].earlier[7:] == ended[0][7:]


def test_a_whole_batch_is_settled(engine: Engine, claims: Claims) -> None:
    held = [taken(answer).row for answer in claims.claim([claim(new_id()) for _ in range(1200)])]
    states: tuple[DeliveryState, ...] = ("sent", "deferred", "failed", "uncertain", "released")
    wishes = [
        row._replace(
            state=states[i % 5],
            settled_at=i + 1,
            next_attempt_at=i,
            reason="r" * 64,
            reply="\N{SNOWMAN}\N{PILE OF POO}'\"\\%s" + "x" * 1000,
            relay="y" * 255,
        )
        for i, row in enumerate(held)
    ]
    assert claims.store(wishes) == [Settlement.STORED] * 1200
    rows = rows_of(engine)
    assert [rows[wish.task_id]._replace(lease_until=wish.lease_until) for wish in wishes] == wishes
    assert claims.store(wishes) == [Settlement.STORED] * 1200, "told twice, stored once"
    second_thoughts = [row._replace(state="failed", reply="no") for row in held[:2]]
    assert claims.store(second_thoughts) == [Settlement.FENCED] * 2, "settled is settled, also for its owner"
    assert rows_of(engine) == rows


@pytest.mark.parametrize("replies", [1, 250])
def test_many_sent_rows_are_stored_each_with_its_own_reply(
    engine: Engine, claims: Claims, replies: int
) -> None:
    owned = [taken(answer).row for answer in claims.claim([claim(new_id()) for _ in range(250)])]
    wanted = [
        sent(row, f"250 it's \\ {number % replies}")._replace(settled_at=number + 7)
        for number, row in enumerate(owned)
    ]
    assert claims.store(wanted) == [Settlement.STORED] * 250
    stored = rows_of(engine)
    assert [stored[row.task_id]._replace(lease_until=row.lease_until) for row in wanted] == wanted
    assert claims.store(wanted) == [Settlement.STORED] * 250, "a repeated call stores nothing twice"


def test_of_many_sent_rows_one_whose_claim_was_lost_is_late(engine: Engine, claims: Claims) -> None:
    owned = [taken(answer).row for answer in claims.claim([claim(new_id()) for _ in range(5)])]
    put_over = owned[2]._replace(owner=token(), attempt=2)
    with engine.begin() as connection:
        store_rows(connection, [put_over])
    wanted = [sent(row) for row in owned]
    wanted[4] = owned[4]._replace(state="released")
    found = claims.store(wanted)
    assert found == [Settlement.LATE if n == 2 else Settlement.STORED for n in range(5)]
    stored = rows_of(engine)
    assert [stored[row.task_id].state for row in owned] == ["sent"] * 4 + ["released"]
    assert (stored[put_over.task_id].owner, stored[put_over.task_id].attempt) == (owned[2].owner, 2)


def test_a_settle_after_a_takeover_stores_only_that_the_mail_was_sent(engine: Engine, claims: Claims) -> None:
    ids = [new_id() for _ in range(6)]
    first = [taken(answer).row for answer in claims.claim([claim(i) for i in ids])]
    # A second owner takes over four; two are still the first owner's.
    expire(engine)
    second = [taken(answer) for answer in claims.claim([claim(i) for i in ids[:4]])]
    assert all(answer.doubtful and answer.row.doubts_in_all == 1 for answer in second)
    wishes = [
        first[0]._replace(state="deferred", settled_at=5, next_attempt_at=6, reason="deferred"),
        first[1]._replace(state="released"),
        first[2]._replace(state="failed", settled_at=5, reason="rejected"),
        sent(first[3]),
        sent(first[4]),
        first[5]._replace(state="deferred", settled_at=5, next_attempt_at=6, reason="deferred"),
    ]
    fenced, late, stored = Settlement.FENCED, Settlement.LATE, Settlement.STORED
    assert claims.store(wishes) == [fenced, fenced, fenced, late, stored, stored]
    rows = rows_of(engine)
    states = [rows[i].state for i in ids]
    assert states == ["sending", "sending", "sending", "sent", "sent", "deferred"]
    assert [rows[i].owner for i in ids[:3]] == [answer.row.owner for answer in second[:3]]
    # The second owner finds its lease lost, and the first owner's outcome stored.
    assert claims.renew([answer.row for answer in second]) == [True, True, True, False]
    assert claims.store([sent(second[3].row, "250 another")]) == [fenced]
    assert rows_of(engine)[ids[3]].reply == "250 2.0.0 ok"
    again = claims.claim([claim(ids[3])])
    assert isinstance(again[0], Settled)


def test_a_renewal_begins_the_lease_anew_and_shows_lost_claims(engine: Engine, claims: Claims) -> None:
    held = [taken(answer).row for answer in claims.claim([claim(new_id()) for _ in range(600)])]
    expire(engine)
    assert claims.renew(held) == [True] * 600
    now = clock(engine)
    for row in rows_of(engine).values():
        assert timedelta(0) <= now + timedelta(seconds=LEASE) - row.lease_until < timedelta(seconds=LEASE)
    expire(engine)
    lost = held[::3]
    claims.claim([claim(row.task_id) for row in lost])
    settled = held[1::3]
    claims.store([sent(row) for row in settled])
    assert claims.renew(held) == [i % 3 == 2 for i in range(600)]


def test_a_locked_row_delays_no_other_rows_renewal(engine: Engine, claims: Claims) -> None:
    held = [taken(answer).row for answer in claims.claim([claim(new_id()) for _ in range(3)])]
    expire(engine)
    with engine.begin() as other:
        other.exec_driver_sql("SELECT 1 FROM deliveries WHERE task_id = %s FOR UPDATE", (held[1].task_id,))
        # An answer, where a wait for the lock would end in an error.
        assert claims.renew(held) == [True, None, True]
    assert claims.renew(held) == [True] * 3


def test_nothing_is_taken_over_while_that_is_forbidden(engine: Engine, claims: Claims) -> None:
    row = taken(claims.claim([claim(new_id())])[0]).row
    expire(engine)
    [answer] = claims.claim([claim(row.task_id)], take_over=False)
    assert answer == Wait(0.0)
    assert claims.store([sent(row)]) == [Settlement.STORED]


def test_an_owner_that_slept_past_its_lease_is_fenced(engine: Engine) -> None:
    claims = Claims(engine, 2.0, hold=False)
    task_id = new_id()
    sleeper = taken(claims.claim([claim(task_id)])[0])
    waited = claims.claim([claim(task_id)])[0]
    assert isinstance(waited, Wait)
    assert 0 < waited.seconds <= 2
    deadline = time.monotonic() + 30
    while not isinstance(answer := claims.claim([claim(task_id)])[0], Taken):
        assert time.monotonic() < deadline
        time.sleep(answer.seconds if isinstance(answer, Wait) else 0)
    assert answer.doubtful
    assert answer.since >= sleeper.since + 2, "nobody takes over before the owner's own clock says so"
    assert claims.renew([sleeper.row]) == [False]
    assert claims.store([sleeper.row._replace(state="released")]) == [Settlement.FENCED]
    assert claims.store([sent(answer.row)]) == [Settlement.STORED]


def test_under_hold_a_takeover_is_stored_as_uncertain(engine: Engine) -> None:
    claims = Claims(engine, LEASE, hold=True)
    task_id = new_id()
    claims.claim([claim(task_id)])
    expire(engine)
    before = clock(engine)
    held, again = claims.claim([claim(task_id), claim(task_id)])
    assert held == again
    assert isinstance(held, Settled)
    assert held.row == rows_of(engine)[task_id]
    assert (held.row.state, held.row.reason) == ("uncertain", IN_DOUBT)
    at = datetime(1970, 1, 1) + timedelta(microseconds=held.row.settled_at)
    assert before <= at <= clock(engine)
    reopened = taken(claims.claim([claim(task_id, epoch=9)])[0])
    assert reopened.earlier == held.row


# --- races ----------------------------------------------------------------------------------------


def test_of_many_claimers_in_many_processes_exactly_one_takes_each_task(database_url: str) -> None:
    ids = [new_id() for _ in range(by_form(120, 300))]
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("forkserver")) as pool:
        runs = [pool.submit(claim_all, database_url, ids, seed, 3) for seed in range(3)]
        won = Counter(task_id for run in runs for task_id in run.result(timeout=120))
    assert won == Counter(ids)


def test_claims_settles_and_renewals_of_the_same_rows_all_come_through(database_url: str) -> None:
    """Takeovers, settles and renewals cross each other's rows, as after a freeze of a whole sender."""
    engine = make_engine(database_url, pool_size=6)
    claims = Claims(engine, 0.05, hold=False, max_resends=1000)
    ids = [new_id() for _ in range(by_form(30, 60))]
    stored: Counter[bytes] = Counter()
    lock = threading.Lock()

    def work(number: int) -> None:
        rng = random.Random(number)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            batch = rng.sample(ids, 15)
            answers = claims.claim([claim(i) for i in batch])
            held = [answer.row for answer in answers if isinstance(answer, Taken)]
            if all(isinstance(answer, Settled) for answer in claims.claim([claim(i) for i in ids])):
                return
            if held:
                claims.renew(held)
                wishes = [sent(row) for row in held]
                with lock:
                    stored.update(
                        wish.task_id
                        for wish, became in zip(wishes, claims.store(wishes), strict=True)
                        if became is not Settlement.FENCED
                    )
        raise AssertionError("some were never settled")

    everyone(5, work)
    assert stored == Counter(ids), "each was stored as sent once"
    assert {row.state for row in rows_of(engine).values()} == {"sent"}
    engine.dispose()
