"""The checker on made-up histories: a sound one passes, and it finds each breach of a rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.chaos.checker import Create, Evidence, Mail, Recovery, Row, check, task_of

A, B, C = (f"01a20d80-e37c-76d0-8ea6-00000000000{n}" for n in range(3))


def mail(id_: str, email: str = "a@b.test") -> Mail:
    return Mail(f"<{id_}@localhost>", email)


def sound() -> Evidence:
    """Return the evidence of three tasks: one sent, one refused by its server, one without an answer."""
    return Evidence(
        creates=[
            Create(1, "a@b.test", "acked", "completed", A),
            Create(2, "reject5@b.test", "acked", "failed", B),
            Create(3, "c@b.test", "unknown", "completed"),
            Create(4, "d@b.test", "unknown", "completed"),
            Create(5, "e@b.test", "refused", "completed"),
        ],
        rows=[
            Row(A, 1, "a@b.test", "completed"),
            Row(B, 2, "reject5@b.test", "failed", "rejected"),
            Row(C, 3, "c@b.test", "completed"),
        ],
        journal=[mail(A), mail(C, "c@b.test")],
        published={"task.created": {A: 1, B: 1, C: 2}, "mail.sent": {A: 1, C: 1}, "mail.failed": {B: 1}},
        lag={"sender": 0},
        recoveries=[Recovery("kill sender-1", "served again after", 11.0, 12.0)],
        collected=1000.0,
    )


def rules(evidence: Evidence, slack: float = 0.0) -> set[str]:
    return {rule for rule, _ in check(evidence, slack).breaches}


def test_a_sound_history_passes() -> None:
    verdict = check(sound())
    assert verdict.ok
    assert (verdict.tasks, verdict.acknowledged, verdict.unknown, verdict.refused) == (5, 2, 2, 1)
    assert (verdict.settled, verdict.lost, verdict.copies) == (2, 0, 0)


def test_acknowledged_and_gone_is_lost() -> None:
    evidence = sound()
    evidence.rows = evidence.rows[1:]
    evidence.journal = evidence.journal[1:]
    verdict = check(evidence)
    assert verdict.lost == 1
    assert rules(evidence) == {"lost"}


@pytest.mark.parametrize("status", ["pending", "processing"])
def test_acknowledged_and_never_settled_is_lost(status: str) -> None:
    evidence = sound()
    evidence.rows = [replace(evidence.rows[0], status=status), *evidence.rows[1:]]
    assert check(evidence).lost == 1
    assert rules(evidence) == {"lost"}


def test_a_task_with_a_future_attempt_is_deferred_and_an_overdue_one_is_lost() -> None:
    evidence = sound()
    evidence.rows = [replace(evidence.rows[0], status="processing", next_at=1030.0), *evidence.rows[1:]]
    verdict = check(evidence)
    assert (verdict.deferred, verdict.lost, verdict.ok) == (1, 0, True)
    evidence.rows = [replace(evidence.rows[0], next_at=990.0), *evidence.rows[1:]]
    assert check(evidence).lost == 1


def test_completed_without_a_mail_is_lost() -> None:
    evidence = sound()
    evidence.journal = evidence.journal[1:]
    assert check(evidence).lost == 1
    assert rules(evidence) == {"lost"}


def test_a_recorded_task_must_end_though_its_client_has_no_answer() -> None:
    evidence = sound()
    evidence.rows = [*evidence.rows[:2], replace(evidence.rows[2], status="pending")]
    evidence.journal = evidence.journal[:1]
    assert rules(evidence) == {"stuck"}
    assert check(evidence).lost == 0


def test_each_copy_needs_its_own_doubt_under_its_message_id() -> None:
    evidence = sound()
    evidence.journal = [mail(A), mail(A), mail(A), mail(C, "c@b.test")]
    verdict = check(evidence)
    assert (verdict.copies, verdict.explained, verdict.unexplained) == (2, 0, 2)
    evidence.doubts = {A: [f"<{A}@localhost>"]}
    verdict = check(evidence)
    assert (verdict.explained, verdict.unexplained) == (1, 1)
    assert rules(evidence) == {"copies"}
    evidence.doubts = {A: [f"<{A}@localhost>", "<other@localhost>"]}
    assert check(evidence).unexplained == 1
    evidence.doubts = {A: [f"<{A}@localhost>"] * 2}
    assert check(evidence).ok


def test_a_doubt_without_a_copy_is_no_breach() -> None:
    evidence = sound()
    evidence.doubts = {A: [f"<{A}@localhost>"] * 2}
    assert check(evidence).ok


def test_copies_under_two_message_ids_are_a_breach() -> None:
    evidence = sound()
    evidence.journal = [*evidence.journal, Mail(f"<{A}@elsewhere>", "a@b.test")]
    evidence.doubts = {A: [f"<{A}@localhost>"]}
    assert rules(evidence) == {"copies"}


def test_a_mail_of_a_failed_or_unknown_task_is_a_breach() -> None:
    evidence = sound()
    evidence.journal = [*evidence.journal, mail(B, "reject5@b.test")]
    assert rules(evidence) == {"unwanted"}
    evidence.journal = [*sound().journal, mail("01a20d80-e37c-76d0-8ea6-999999999999")]
    assert rules(evidence) == {"stray"}
    evidence.journal = [mail(A, "other@b.test"), *sound().journal[1:]]
    assert rules(evidence) == {"stray"}


def test_the_wrong_end_is_a_breach() -> None:
    evidence = sound()
    evidence.rows = [replace(evidence.rows[0], status="failed", reason="expired"), *evidence.rows[1:]]
    evidence.journal = evidence.journal[1:]
    evidence.published = None
    assert rules(evidence) == {"end"}


def test_one_client_task_recorded_twice_is_a_breach() -> None:
    evidence = sound()
    evidence.published = None
    twice = Row("01a20d80-e37c-76d0-8ea6-000000000009", 1, "a@b.test", "completed")
    evidence.rows = [*evidence.rows, twice]
    evidence.journal = [*evidence.journal, mail(twice.id)]
    assert rules(evidence) == {"double"}


def test_recorded_though_refused_is_a_breach() -> None:
    evidence = sound()
    evidence.published = None
    late = Row("01a20d80-e37c-76d0-8ea6-000000000009", 5, "e@b.test", "completed")
    evidence.rows = [*evidence.rows, late]
    evidence.journal = [*evidence.journal, mail(late.id, "e@b.test")]
    assert rules(evidence) == {"refused"}


def test_answers_that_no_client_expects_are_breaches() -> None:
    evidence = sound()
    evidence.creates = [*evidence.creates, Create(6, "f@b.test", "error", "completed", details="INTERNAL")]
    assert rules(evidence) == {"answer"}
    evidence.creates = [replace(evidence.creates[0], number=7), *evidence.creates[1:5]]
    assert rules(evidence) == {"answer"}


def test_the_topics_must_hold_what_the_table_says() -> None:
    for gone in ("task.created", "mail.sent", "mail.failed"):
        evidence = sound()
        assert evidence.published is not None
        evidence.published = {t: ids for t, ids in evidence.published.items() if t != gone}
        assert rules(evidence) == {"topics"}


def test_lag_dead_letters_and_crashes_are_breaches() -> None:
    evidence = sound()
    evidence.lag = {"sender": 3}
    evidence.dead = ["sender.dead: ValueError"]
    evidence.crashes = ["sender-1 ended by signal 11"]
    assert rules(evidence) == {"lag", "dead", "crash"}


def test_late_recoveries_are_breaches_beyond_the_slack() -> None:
    evidence = sound()
    evidence.recoveries = [Recovery("kill sender-1", "served again after", 13.0, 12.0)]
    assert rules(evidence) == {"late"}
    assert rules(evidence, slack=2) == set()
    evidence.recoveries = [Recovery("kill sender-1", "served again after", None, 12.0)]
    assert rules(evidence) == set(), "the next fault came first"
    evidence.recoveries = [Recovery("kill sender-1", "served again after", None, 12.0, gave_up=True)]
    assert rules(evidence, slack=99) == {"late"}
    evidence.recoveries = [Recovery("freeze dns", "served again after", 40.0)]
    assert rules(evidence) == set(), "nothing is promised"


def test_the_task_of_a_message_id() -> None:
    assert task_of(f"<{A}@mail.example>") == A
