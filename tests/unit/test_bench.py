"""The bench: its command line, its arithmetic, and that it fails where a task is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.local import database
from deploy.local.database_tree import Server
from deploy.local.kafka_java import java
from deploy.local.layout import Layout
from deploy.local.state import StackState
from tests.bench import counts, diagnosis, limit, report, storage, throughput
from tests.bench.__main__ import RUN, main, parser
from tests.bench.counts import WrongCountsError
from tests.bench.diagnosis import Diagnosis
from tests.bench.measure import Figures, is_refusal, median, quantiles
from tests.bench.receivers import mails_in
from tests.bench.stage import metric
from tests.bench.usage import Usage, spent

ONE = Figures(
    tasks=100,
    refused=0,
    rate=500.0,
    create_rate=600.0,
    cpu_us={"api": 300.0, "kafka": 200.0},
    create_ms={"p50": 1.0, "p95": 2.0, "p99": 3.0},
    accepted_ms={"p50": 10.0, "p95": 20.0, "p99": 30.0},
)


def test_every_scenario_has_a_command_line() -> None:
    """`limit` also wants the sketch's folder, and `stage` a name."""
    words: dict[str, Sequence[str]] = {"stage": ["sender"], "limit": ["somewhere"]}
    for name in RUN:
        given = parser().parse_args([name, *words.get(name, ()), "--json", "figures.json"])
        assert given.json == Path("figures.json")
        assert given.warm_up >= 0


def test_lists_of_numbers() -> None:
    given = parser().parse_args(["steady", "--rates", "50,200"])
    assert list(throughput.loads_of("steady", given)) == ["steady 50 a second", "steady 200 a second"]
    given = parser().parse_args(["pipeline"])
    assert list(throughput.loads_of("pipeline", given)) == [
        "unary 64 callers",
        "batch 500",
        "steady 200 a second",
    ]
    given = parser().parse_args(["unary", "--callers", "8"])
    assert list(throughput.loads_of("unary", given)) == ["unary 8 callers"]


@pytest.mark.parametrize(
    "words",
    [
        ["steady", "--rates", "fast"],
        ["steady", "--rates", "0"],
        ["replicas", "--stages", "sendr"],
        ["stage", "api"],
        ["batch", "--faster"],
    ],
)
def test_a_wrong_command_line_ends_at_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


class Counted:
    """An installation with the counts of `created` tasks, but for what `wrong` says."""

    def __init__(self, created: int, **wrong: int) -> None:
        self.created = created
        self._counts = {**counts.expected(created), **wrong}

    def number(self, statement: str) -> int:
        """Answer the statements of counts.py."""
        if "LIMIT 1" in statement:
            return int(self._counts["completed"] < self.created)
        [name] = [name for name, known in counts._COUNTS.items() if known == statement]
        return self._counts[name]

    def mails(self) -> int:
        """Return what the receiver counted."""
        return self._counts["mails"]


def _settle(installation: Any) -> dict[str, int]:
    return counts.wait_until_settled(installation, seconds=0)


def test_right_counts_are_returned() -> None:
    assert _settle(Counted(10)) == counts.expected(10)
    counts.wait_until_ended(Counted(10), seconds=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("tasks", 9),
        ("completed", 9),
        ("sent", 9),
        ("bodies", 9),
        ("events", 29),
        ("outbox", 1),
        ("mails", 11),
    ],
)
def test_a_lost_task_or_a_copy_fails(name: str, number: int) -> None:
    with pytest.raises(WrongCountsError, match=rf"^{name} {number}, not \d+$"):
        _settle(Counted(10, **{name: number}))


def test_a_task_that_never_ends_fails() -> None:
    for wrong in ({"mails": 9}, {"completed": 9}):
        with pytest.raises(WrongCountsError, match="not ended"):
            counts.wait_until_ended(Counted(10, **wrong), seconds=0.02)  # type: ignore[arg-type]


def test_without_a_word_the_pipeline_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setitem(RUN, "pipeline", lambda given: {"ran": ran.append(given.scenario)})
    assert main([]) == 0
    assert ran == ["pipeline"]


def test_wrong_counts_are_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(_: object) -> dict[str, Any]:
        raise WrongCountsError("sent 9, not 10")

    monkeypatch.setitem(RUN, "idle", lose)
    assert main(["idle"]) == 1


def test_figures_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(RUN, "idle", lambda _: {"services": 1.5})
    assert main(["idle", "--json", str(tmp_path / "idle.json")]) == 0
    assert (tmp_path / "idle.json").read_text() == '{\n "services": 1.5\n}\n'


def test_the_median_of_rounds() -> None:
    rounds = [replace(ONE, rate=rate, cpu_us={"api": rate / 10}) for rate in (100.0, 900.0, 400.0)]
    found = median(rounds)
    assert (found.rate, found.cpu_us, found.tasks, found.total_us) == (400.0, {"api": 40.0}, 300, 40.0)


def test_quantiles_in_milliseconds() -> None:
    assert quantiles([n / 1000 for n in range(1001)]) == {"p50": 500.0, "p95": 950.0, "p99": 990.0}
    assert quantiles([0.25]) == {"p50": 250.0, "p95": 250.0, "p99": 250.0}


def test_a_refusal_is_no_failure() -> None:
    assert is_refusal("RESOURCE_EXHAUSTED: 5000 Creates wait")
    assert is_refusal("UNAVAILABLE: Stream removed (RST_STREAM (Received RST_STREAM with error code 7))")
    assert not is_refusal("UNAVAILABLE: the database does not answer")


def test_ratios_of_two_clones() -> None:
    other = replace(
        ONE, rate=250.0, cpu_us={"api": 600.0, "kafka": 100.0}, accepted_ms={"p50": 20, "p99": 30}
    )
    found = report.ratios({"batch 500, sink, this": [ONE], "batch 500, sink, other": [other]})
    assert found.splitlines()[1] == (
        "  batch 500, sink: rate 2.00, CPU a task 0.71 (api 0.50  kafka 2.00), to acceptance 0.50/1.00"
    )
    assert report.ratio(1, 0) == float("inf")


def test_the_sketch_is_compared_by_its_better_case() -> None:
    rows = [
        {"name": case, "load": load, "rate": rate, "system_us": cpu, "mail_p50_ms": 5.0, "mail_p99_ms": 20.0}
        for case, rate, cpu in (
            ("i-base", 800.0, 400.0),
            ("i-base", 1200.0, 400.0),
            ("i-nowait", 900.0, 250.0),
        )
        for load in ("unary64", "batch500", "rate200")
    ]
    lines = limit.compared(dict.fromkeys(("unary64", "batch500", "rate200"), ONE), rows)
    assert lines == [
        "unary64: rate 500 / 1000 (i-base) = 0.50, CPU a task 500 / 250 us (i-nowait) = 2.00",
        "batch500: rate 500 / 1000 (i-base) = 0.50, CPU a task 500 / 250 us (i-nowait) = 2.00",
        "rate200 and i-base: CPU a task 500 / 400 us = 1.25,"
        " p50 10.0 / 5.0 ms = 2.00, p99 30.0 / 20.0 ms = 1.50",
        "rate200 and i-nowait (tuned for latency): CPU a task 500 / 250 us = 2.00,"
        " p50 10.0 / 5.0 ms = 2.00, p99 30.0 / 20.0 ms = 1.50",
    ]


def test_cpu_by_service() -> None:
    before = {"sender-1": Usage(1.0, 50), "mysql": Usage(3.0, 50), "api-1": Usage(1.0, 50)}
    after = {"sender-1": Usage(1.5, 50), "sender-2": Usage(0.25, 50), "mysql": Usage(4.0, 50)}
    assert spent(before, after) == {"sender": 0.75, "mysql": 1.0}


def test_counts_of_smtp_sink() -> None:
    """It rewrites one line without end; the last rewriting may be cut off."""
    assert mails_in(b"sess=1 quit=0 mesg=41\rsess=1 quit=0 mesg=42\rsess=1 qu") == 42
    assert mails_in(b"sess=1 quit=0 mesg=41\rsess=1 quit=0 mesg=4") == 41
    assert mails_in(b"") == 0


def test_a_metric_is_summed() -> None:
    text = 'a_total{x="1"} 2.0\na_total{x="2"} 3.0\na_total_of_others 9\n# HELP a_total\n'
    assert metric(text, "a_total") == 5.0


def test_requests_by_kind_and_client() -> None:
    log = [
        "2026-01-01 DEBUG logger Completed request:"
        f'{{"requestHeader":{{"requestApiKeyName":"{kind}","clientId":"sender-1"}},"request":{{}}}}\n'
        for kind in ("FETCH", "FETCH", "PRODUCE")
    ]
    lines = diagnosis.count_requests([*log, "2026-01-01 INFO something else\n"], 4)
    assert [line.split() for line in lines[1:]] == [
        ["2", "0.5000", "FETCH", "sender-1"],
        ["1", "0.2500", "PRODUCE", "sender-1"],
        ["3", "0.7500", "all"],
    ]


def test_bytes_of_matching_files(tmp_path: Path) -> None:
    for name, content in (("a.x-0/0.log", "four"), ("a.x-0/0.index", "no"), ("b.x-0/0.log", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert storage.size(tmp_path, "a.*/*.log") == 4


def test_the_servers_show_their_work_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both cost CPU, so a run whose figures count has neither."""
    monkeypatch.setattr(database, "find_server", lambda kind: Server(kind, ("mysqld",), "9"))

    def argv() -> str:
        component = database.database_component(Layout(tmp_path), StackState())
        return " ".join([*component.argv, *java("512m")])

    asked = diagnosis.given(Diagnosis(statements=True, requests=True))
    for name in asked:
        monkeypatch.delenv(name, raising=False)
    assert "performance-schema=OFF" in argv()
    assert "log4j2.xml" in argv()
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert "performance-schema=ON" in argv()
    assert "log4j2-requests.xml" in argv()
    assert diagnosis.given(Diagnosis()) == {}
