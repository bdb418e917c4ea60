"""Runs `postroad` for tasks on the whole system: checks its structured output, and what a user sees."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests import forked
from tests.api_process import ApiProcess
from tests.cli import Command, Done
from tests.e2e.pipeline import Pipeline, until
from tests.stack import Stack

FAILED, USAGE, NOT_FOUND, DENIED = 1, 2, 3, 4
UNKNOWN = "019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071"


@pytest.fixture
def postroad(stack: Stack) -> Command:
    return Command({"POSTROAD_ENV_FILE": str(stack.directory / "stack.env")})


@pytest.fixture
def pipeline(stack: Stack) -> Iterator[Pipeline]:
    with Pipeline(stack) as pipeline:
        yield pipeline


def created(done: Done) -> str:
    assert done.code == 0, done.err
    id_: str = done.json["id"]
    return id_


def test_a_mail_from_flags_goes_out_complete(postroad: Command, pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>Hello")
    flags = ["--subject", "Grüße", "--body", "-", "--html-file", str(tmp_path / "page.html")]
    flags += ["--label", "cli=one", "--header", "Reply-To: desk@good.test", "--idempotency-key", "cli-one"]
    first = postroad("create", "ada@good.test", *flags, "-o", "json", given="From stdin.\n")
    id_ = created(first)
    assert created(postroad("create", "ada@good.test", *flags, "-o", "json", given="From stdin.\n")) == id_
    pipeline.settled([id_])
    row = postroad("get", id_, "-o", "json").json
    assert (row["status"], row["subject"], row["labels"]) == ("completed", "Grüße", {"cli": "one"})
    assert (row["body"], row["html"]) == ("From stdin.\n", "<p>Hello")
    assert [step["kind"] for step in row["timeline"]] == ["created", "mx_ok", "sent"]
    assert row["timeline"][2]["reply"].startswith("250 ")
    (mail,) = [entry for entry in pipeline.stack.journal() if id_ in entry["message_id"]]
    text = (pipeline.stack.mail / mail["path"]).read_text()
    assert "Reply-To: desk@good.test" in text


def test_a_refused_mail_names_its_fields(postroad: Command) -> None:
    done = postroad("create", "nobody", "-S", "", "-b", "b")
    assert (done.code, done.out) == (USAGE, "")
    assert done.err.startswith("postroad: email: ")
    assert "; subject: " in done.err
    assert len(done.err.splitlines()) == 1


def test_another_mail_under_the_same_key_fails(postroad: Command) -> None:
    created(postroad("create", "a@good.test", "-S", "s", "-b", "b", "-k", "cli-key", "-o", "json"))
    done = postroad("create", "a@good.test", "-S", "other", "-b", "b", "-k", "cli-key")
    assert done.code == FAILED
    assert "the idempotency key was used for another request" in done.err


def test_several_recipients_succeed_and_fail_by_themselves(postroad: Command) -> None:
    to = ["a@good.test", "nobody", "b@good.test"]
    done = postroad("create", *to, "-S", "s", "-b", "b", "-k", "many", "-o", "jsonl")
    assert done.code == USAGE
    good, bad, other = done.objects
    assert (good["email"], other["email"], bad["email"]) == ("a@good.test", "b@good.test", "nobody")
    assert (bad["number"], bad["error"]["code"]) == (2, "INVALID_ARGUMENT")
    assert done.err.startswith("postroad: nobody (mail 2): ")
    again = postroad("create", to[0], to[2], "-S", "s", "-b", "b", "-k", "many", "-o", "jsonl")
    assert (again.code, [row["id"] for row in again.objects]) == (0, [good["id"], other["id"]])


def test_a_batch_file_of_more_than_one_batch(postroad: Command, tmp_path: Path) -> None:
    path = tmp_path / "mails.jsonl"
    # Mails that wait for their time occupy no stage.
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    mail = {"subject": "s", "body": "b", "labels": {"batch": "1"}, "send_at": later}
    mails = ({"email": f"batch-{n}@good.test", **mail} for n in range(1003))
    path.write_text("\n".join(map(json.dumps, mails)))
    done = postroad("create", "--batch", str(path), "-o", "jsonl")
    assert (done.code, len({row["id"] for row in done.objects})) == (0, 1003), done.err
    assert [row["number"] for row in done.objects] == list(range(1, 1004))
    listed = postroad("list", "--label", "batch=1", "--all", "-o", "json").json
    assert {row["id"] for row in listed} == {row["id"] for row in done.objects}
    counted = postroad("list", "--label", "batch=1", "--count", "-o", "json").json
    assert counted["total"] == sum(counted["counts"].values()) == 1003
    assert list(counted["counts"]) == [
        "pending",
        "processing",
        "completed",
        "failed",
        "uncertain",
        "cancelled",
    ]


def test_list_takes_all_filters_together(postroad: Command, pipeline: Pipeline) -> None:
    label = "list-1"
    ids = [pipeline.create(f"filter-{n}@good.test", labels={"t": label, "n": str(n % 2)}) for n in range(4)]
    gone = pipeline.create("x@nxdomain.test", labels={"t": label})
    pipeline.settled([*ids, gone])

    def found(*flags: str) -> list[str]:
        done = postroad("list", "--label", f"t={label}", *flags, "-o", "jsonl")
        assert done.code == 0, done.err
        return [row["id"] for row in done.objects]

    assert found() == [gone, *reversed(ids)]
    assert found("--status", "completed", "--label", "n=1") == [ids[3], ids[1]]
    assert found("-s", "failed", "-s", "completed", "--from", "-10m", "--to", "now") == [gone, *reversed(ids)]
    assert found("--email", "filter-2@good.test") == [ids[2]]
    assert found("--domain", "nxdomain.test", "--reason", "no_such_domain") == [gone]
    assert found("--to", "-10m") == []
    done = postroad("list", "--label", f"t={label}", "--limit", "2", "-o", "json")
    assert [row["id"] for row in done.json] == [gone, ids[3]]
    assert done.err == "There are more than 2: use --limit or --all.\n"
    none = postroad("list", "--label", "t=nothing")
    assert (none.code, none.out, none.err) == (0, "", "No such task.\n")


def test_unknown_ids_are_a_line_and_exit_code_3(postroad: Command) -> None:
    for command in ("get", "watch", "retry", "cancel"):
        done = postroad(command, UNKNOWN)
        assert (done.code, done.out) == (NOT_FOUND, ""), command
        (line,) = done.err.splitlines()
        assert f"no task {UNKNOWN}" in line
    assert postroad("get", "nonsense").code == USAGE


def test_retry_and_cancel_exit_with_the_worst_code(postroad: Command, pipeline: Pipeline) -> None:
    sent, failed = pipeline.create("a@good.test"), pipeline.create("x@nxdomain.test")
    pipeline.settled([sent, failed])
    done = postroad("retry", failed, UNKNOWN, failed, "-o", "jsonl")
    assert done.code == NOT_FOUND
    again, missing = done.objects
    assert (again["id"], missing["id"], missing["error"]["code"]) == (failed, UNKNOWN, "NOT_FOUND")
    assert done.err == f"postroad: {UNKNOWN}: no task {UNKNOWN}\n"
    until(lambda: [s.kind for s in pipeline.get(failed).timeline].count("mx_failed") == 2, "a second verdict")

    held = created(postroad("create", "a@good.test", "-S", "s", "-b", "b", "--send-at", "+1h", "-o", "json"))
    done = postroad("cancel", held, "-o", "json")
    assert (done.code, [row["status"] for row in done.json]) == (0, ["cancelled"])
    # The ids may come from another command. The exit code is then this command's, unlike with xargs.
    done = postroad("cancel", "-", "-o", "json", given=f"{sent}\n\n{held}\n{sent}\n")
    assert (done.code, [row["status"] for row in done.json]) == (FAILED, ["completed", "cancelled"])


def test_watch_ends_when_its_task_is_settled(postroad: Command, pipeline: Pipeline) -> None:
    id_ = created(postroad("create", "x@flaky-1.test", "-S", "s", "-b", "b", "-o", "json"))
    done = postroad("watch", id_, "-o", "jsonl", "--timeout", "60")
    assert done.code == 0, done.err
    rows = done.objects
    assert {row["task"]["id"] for row in rows} == {id_}
    assert rows[-1]["task"]["status"] == "completed"
    kinds = [row["change"]["kind"] for row in rows if row["change"]]
    # A watch is ahead of the fold.
    pipeline.settled([id_])
    timeline = [step.kind for step in pipeline.get(id_).timeline]
    assert kinds == timeline[len(timeline) - len(kinds) :]
    settled = postroad("watch", id_, "--exit-status")
    assert (settled.code, settled.out.count(id_)) == (0, 1)
    bad = pipeline.create("x@nxdomain.test")
    pipeline.settled([bad])
    assert postroad("watch", bad).code == 0
    assert postroad("watch", bad, "--exit-status").code == FAILED


def test_watch_ends_at_its_timeout(postroad: Command) -> None:
    held = created(postroad("create", "a@good.test", "-S", "s", "-b", "b", "--send-at", "+1h", "-o", "json"))
    done = postroad("watch", held, "--timeout", "1")
    assert (done.code, done.err) == (FAILED, "postroad: not settled in time\n")


def test_watch_continues_after_a_restart_of_the_api(
    postroad: Command, pipeline: Pipeline, stack: Stack
) -> None:
    """Changes while the api is away come when it is back; Ctrl-C then ends the command."""
    with postroad.following("watch", "--label", "t=outlive", "-o", "jsonl") as watch:

        def stands() -> bool:
            pipeline.create("a@good.test", labels={"t": "outlive"})
            return bool(watch.objects)

        def kinds(id_: str) -> list[str]:
            return [
                row["change"]["kind"] for row in watch.objects if row["change"] and row["task"]["id"] == id_
            ]

        until(stands, "a first watch message", 30)
        try:
            with stack.frozen("sender-1"):
                waiting = pipeline.create("a@good.test", labels={"t": "outlive"})
                until(lambda: pipeline.get(waiting).status == "processing", "validated")
                stack.stop("api-1")
            until(lambda: any(waiting in mail["message_id"] for mail in stack.journal()), "sent")
        finally:
            stack.start("api-1")
        until(lambda: kinds(waiting) == ["created", "mx_ok", "sent"], "every change, each once", 30)
    assert watch.code == 130
    assert watch.errors[-1] == "postroad: interrupted"
    assert [line for line in watch.errors if line.endswith("going on when it is back")]


def test_tables_fit_80_and_160_columns(postroad: Command, pipeline: Pipeline) -> None:
    subject = "A subject that is far too long for any terminal, again and again, " * 3
    id_ = pipeline.create("somebody-with-a-long-name@refused-for-this-very-long-name.ok.test", subject)
    pipeline.settled([id_])
    list_, get, watch = ["list", "-n", "5"], ["get", id_], ["watch", id_]
    counts = (["lag", "--interval", "0"], ["list", "--count"])
    for columns, commands in {80: (list_, get, watch, *counts), 160: (list_,)}.items():
        for arguments in commands:
            done = postroad.on_terminal(*arguments, columns=columns)
            assert done.code == 0, done.err
            listed = _uncoloured(done.out)
            wide = [line for line in listed.splitlines() if len(line) > columns]
            assert wide == [] or arguments == get, wide
            assert arguments in counts or id_ in listed
    assert "SUBJECT" in listed.splitlines()[0]
    assert "…" in listed


def _uncoloured(text: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_colour_is_for_terminals_that_want_it(postroad: Command, pipeline: Pipeline) -> None:
    id_ = pipeline.create("a@good.test", "x" * 200)
    pipeline.settled([id_])
    assert "\x1b[" in postroad.on_terminal("list", "-n", "1").out
    assert "\x1b[" not in postroad.on_terminal("list", "-n", "1", NO_COLOR="1").out
    piped = postroad("list", "-n", "1")
    assert "\x1b[" not in piped.out
    assert "x" * 200 in piped.out
    assert json.loads(postroad.on_terminal("list", "-n", "1", "-o", "json").out)[0]["id"] == id_


def test_flags_beat_the_environment(postroad: Command, stack: Stack) -> None:
    good = stack.env()["POSTROAD_API"]
    assert postroad("list", "-n", "1", "--api", good, POSTROAD_API="127.0.0.1:1").code == 0
    assert postroad("--api", good, "list", "-n", "1", POSTROAD_API="127.0.0.1:1").code == 0
    assert postroad("list", "-n", "1", POSTROAD_API="127.0.0.1:1").code == 5


def test_a_token_gives_access_to_its_tenant(stack: Stack, tmp_path: Path) -> None:
    with ApiProcess(stack, POSTROAD_API_TOKENS="blue:blue-token-1,red:red-token-22") as api:
        config = tmp_path / "config.toml"
        config.write_text(f'[profiles.blue]\napi = "{api.target}"\ntoken = "blue-token-1"\n')
        config.chmod(0o600)
        postroad = Command({"POSTROAD_CONFIG": str(config)})
        for flags in ([], ["--token", "wrong-token"]):
            done = postroad("list", "--api", api.target, *flags)
            assert (done.code, done.out) == (DENIED, "")
            assert "POSTROAD_TOKEN" in done.err
        mail = ("a@good.test", "-S", "s", "-b", "b")
        id_ = created(postroad("create", *mail, "--profile", "blue", "-o", "json"))
        assert postroad("get", id_, POSTROAD_PROFILE="blue").code == 0
        assert postroad("get", id_, "--profile", "blue", "--token", "red-token-22").code == NOT_FOUND
        assert postroad("watch", id_, "--profile", "blue", "--timeout", "30").code == 0


def test_lag_shows_which_stage_is_behind(postroad: Command, pipeline: Pipeline, stack: Stack) -> None:
    until(lambda: postroad("lag", "--interval", "0", "-o", "json").json["stages"][1]["lag"] == 0, "no lag")
    stack.stop("sender-1")
    try:
        ids = [pipeline.create(f"lag-{n}@good.test") for n in range(10)]
        until(lambda: all(pipeline.get(id_).status == "processing" for id_ in ids), "all validated")
        time.sleep(1.1)  # what waits has an age
        found = postroad("lag", "--partitions", "--interval", "0.2", "-o", "json").json
        stages = {row["stage"]: row for row in found["stages"]}
        assert [(s, len(r["members"])) for s, r in stages.items()] == [
            *(("validator", 1), ("sender", 0), ("status", 1))
        ]
        assert [m["client"] for m in stages["validator"]["members"]] == ["validator-1"]
        assert (stages["sender"]["lag"], stages["sender"]["unowned"]) == (10, stages["sender"]["partitions"])
        assert stages["sender"]["oldest_waiting_seconds"] > 1
        assert stages["validator"]["oldest_waiting_seconds"] is None
        rows = [row for row in found["partitions"] if row["stage"] == "sender" and row["lag"]]
        assert sum(row["lag"] for row in rows) == 10
        assert {row["topic"] for row in rows} == {"mx.ok"}
        assert max(r["oldest_waiting_seconds"] for r in rows) == stages["sender"]["oldest_waiting_seconds"]
        only = postroad("lag", "--stage", "sender", "--interval", "0", "-o", "json").json
        assert [row["stage"] for row in only["stages"]] == ["sender"]
    finally:
        stack.start("sender-1")
    pipeline.settled(ids)


def test_delayed_records_are_no_lag(postroad: Command, pipeline: Pipeline) -> None:
    pipeline.create("x@servfail.test")

    def waits() -> list[dict[str, object]]:
        found = postroad("lag", "--stage", "validator", "--interval", "0", "-o", "json").json
        rows = [row for row in found["delays"] if row["waiting"]]
        return rows if found["stages"][0]["lag"] == 0 else []

    assert until(waits, "on a delay topic, and no lag")[0]["next_due_at"]


def test_watched_tables_are_drawn_again(postroad: Command) -> None:
    def stop(process: forked.Process, text: str) -> None:
        if not stopped and text.count("\x1b[H\x1b[2J") >= 2 and text.count("STAGE") >= 3:
            stopped.append(True)
            process.send_signal(signal.SIGINT)

    stopped: list[bool] = []
    done = postroad.on_terminal("lag", "--watch", "--interval", "0.2", act=stop)
    assert (done.code, done.err) == (130, "postroad: interrupted\n")
