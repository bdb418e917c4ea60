"""A failing command writes one line, and its exit code says what kind of failure it is."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from services.cli.errors import explain
from tests.cli import ARGV, Command

AWAY = "127.0.0.1:1"
URL = "mysql+mysqlconnector://postroad@127.0.0.1:1/postroad"
ID = "019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071"

USAGE, UNAVAILABLE = 2, 5


@pytest.fixture(scope="module")
def postroad() -> Command:
    return Command()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("frobnicate", "no such command 'frobnicate' (try 'postroad --help')"),
        ("list --nope", "no such option: --nope "),
        ("list --status nope", "'nope' is not one of 'pending', 'processing', 'completed', 'failed'"),
        ("list --limit 0", "invalid value for '--limit'"),
        ("list --from yesterday", "'yesterday' is no time: write 2026-01-31T12:00:00Z"),
        ("list --label a", "--label 'a' is no KEY=VALUE"),
        ("list --count --all", "--count counts all anyway"),
        ("list -o xml", "'xml' is not one of 'table', 'json', 'jsonl' (try 'postroad list --help')"),
        ("-o xml list", "'xml' is not one of 'table', 'json', 'jsonl' (try 'postroad --help')"),
        ("get", "missing argument 'ID' (try 'postroad get --help')"),
        ("get --kafka x:1 " + ID, "no such option: --kafka"),
        ("create", "a mail needs an ADDRESS and --subject"),
        ("create a@x.example", "a mail needs an ADDRESS and --subject"),
        ("create a@x.example -S s -b b --send-at soon", "'soon' is no time"),
        ("create a@x.example -S s -H nonsense", "--header 'nonsense' is no KEY:VALUE"),
        ("create a@x.example -S s -b b --body-file x", "--body and --body-file are one and the same part"),
        (
            "create a@x.example -S s --html-file nowhere.html",
            "--html-file nowhere.html: No such file or directory",
        ),
        ("create --batch nowhere.jsonl", "--batch nowhere.jsonl: No such file or directory"),
        ("create --batch - -S s", "--batch takes its mails from the file alone"),
        ("watch --follow", "--follow and --exit-status are for one task: name its ID"),
        ("watch --status failed " + ID, "either an ID or flags that choose tasks, not both"),
        ("lag --stage nope", "'nope' is not one of 'validator', 'sender', 'status'"),
        ("list --api nonsense", "POSTROAD_API (--api) is 'nonsense', no host:port"),
        ("list --profile nope", "no profile 'nope' in the config file; it has: none"),
        ("list --config nowhere.toml", "nowhere.toml: no such config file"),
        ("list --env-file nowhere.env", "nowhere.env: No such file or directory"),
        ("migrate --database nonsense", "POSTROAD_DATABASE_URL (--database): Could not parse SQLAlchemy URL"),
        (
            "migrate --database mysql://u:p@h:abc/x",
            "POSTROAD_DATABASE_URL (--database): its port is no number",
        ),
        ("migrate --database postgresql://", "postgresql:// is neither mysql:// nor mariadb://"),
        ("replay mx.ok --database sqlite:///x", "sqlite:// is neither mysql:// nor mariadb://"),
        ("replay mx.ok --domain slow.example.", "--domain: 'slow.example.': "),
        ("replay mx.ok --recipient slow.example", "--recipient: 'slow.example': "),
        ("rebuild --database mysql+pymysql://u@h/x", "mysql+pymysql:// is neither mysql:// nor mariadb://"),
        ("list --token aé", "POSTROAD_TOKEN (--token) has other characters than visible ASCII"),
    ],
)
def test_a_bad_flag_gets_a_line_and_exit_code_2(postroad: Command, arguments: str, says: str) -> None:
    done = postroad(*arguments.split())
    assert (done.code, done.out) == (USAGE, "")
    (line,) = done.err.splitlines()
    assert line.startswith("postroad: ")
    assert says in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (f"list --api {AWAY}", "the api does not answer: "),
        (f"list --all -o json --api {AWAY}", "the api does not answer: "),
        (f"get {ID} --api nowhere.invalid:1", "the api does not answer: "),
        (f"create a@x.example -S s -b b --api {AWAY}", "the api does not answer: "),
        (f"create a@x.example b@x.example -S s -b b --api {AWAY}", "mails 1 to 2 may or may not be recorded"),
        (f"watch {ID} --api {AWAY}", "the api does not answer: "),
        (f"retry {ID} {ID} --api {AWAY}", "the api does not answer: "),
        (f"cancel {ID} --api {AWAY}", "the api does not answer: "),
        (f"lag --kafka {AWAY}", "Kafka at 127.0.0.1:1 does not answer: "),
        (f"topics apply --kafka {AWAY}", "Kafka at 127.0.0.1:1 does not answer: "),
        (f"topics apply --grow --kafka {AWAY}", "Kafka at 127.0.0.1:1 does not answer: "),
        (f"topics check --kafka {AWAY}", "Kafka at 127.0.0.1:1 does not answer: "),
        (f"dead list --kafka {AWAY}", "Kafka at 127.0.0.1:1 does not answer: "),
        (f"migrate --database {URL}", "the database: "),
    ],
)
def test_an_unreachable_server_gets_a_line_and_exit_code_5(
    postroad: Command, arguments: str, says: str
) -> None:
    done = postroad(*arguments.split())
    assert done.code == UNAVAILABLE, done
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("postroad: ")
    assert says in line


def test_a_wrong_setting_names_its_variable(postroad: Command) -> None:
    done = postroad("lag", POSTROAD_PARTITIONS="many")
    assert (done.code, done.out) == (USAGE, "")
    assert done.err.startswith("postroad: POSTROAD_PARTITIONS: ")
    assert len(done.err.splitlines()) == 1


def test_a_bad_line_of_a_batch_is_named(postroad: Command) -> None:
    lines = '{"email": "a@x.example", "subject": "s", "body": ""}\n{"emial": "b@x.example"}\n'
    done = postroad("create", "--batch", "-", "--api", AWAY, given=lines)
    assert (done.code, done.out) == (USAGE, "")
    assert "-, line 2: " in done.err
    assert "0 mails before it are done" in done.err


@pytest.mark.parametrize("name", ["mails", "-"])
def test_a_batch_line_that_is_not_utf8_is_named(postroad: Command, tmp_path: Path, name: str) -> None:
    path = tmp_path / "mails"
    path.write_bytes(b'{"email": "a@x.example", "subject": "s", "body": ""}\n{"email": "\xff"}\n')
    given = str(path) if name == "mails" else name
    with path.open("rb") as file:
        process = subprocess.run(
            [*ARGV, "create", "--batch", given, "--api", AWAY],
            env=postroad.environment,
            stdin=file,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert (process.returncode, process.stdout) == (USAGE, "")
    printed = f"postroad: {given}, line 2: it is not in UTF-8; 0 mails before it are done\n"
    assert process.stderr == printed


@pytest.mark.parametrize(
    "arguments",
    [["create", "a\udcff@x.example", "-S", "s", "-b", "b"], ["list", "--email", "\udcff"], ["get", "\udcff"]],
)
def test_an_argument_that_is_not_utf8_gets_a_line(postroad: Command, arguments: list[str]) -> None:
    done = postroad(*arguments, "--api", AWAY)
    assert (done.code, done.out) == (USAGE, "")
    assert re.fullmatch(r"postroad: '.*\\udcff.*' is not in UTF-8\n", done.err)


@pytest.mark.parametrize("home", ["/dev/null", "/proc/1/root"])
def test_an_unreadable_default_config_file_is_ignored(postroad: Command, home: str) -> None:
    """One home is no directory, the other one is not readable."""
    done = postroad("list", "--api", AWAY, HOME=home, POSTROAD_CONFIG="")
    assert done.code == UNAVAILABLE, done
    asked = postroad("list", "--api", AWAY, "--config", "/dev/null/config.toml")
    assert (asked.code, asked.err) == (USAGE, "postroad: /dev/null/config.toml: Not a directory\n")


def test_a_body_that_is_not_utf8_is_refused(postroad: Command, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(b"\xff\xfe")
    done = postroad("create", "a@x.example", "-S", "s", "--body-file", str(tmp_path / "body"))
    assert (done.code, done.err) == (
        USAGE,
        f"postroad: --body-file {tmp_path / 'body'}: the file is not in UTF-8\n",
    )


def test_ctrl_c_gets_a_line_and_exit_code_130(postroad: Command) -> None:
    """A server that accepts the connection and stays silent keeps the command waiting."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = postroad.start("list", "--api", f"127.0.0.1:{silent.getsockname()[1]}")
        # The reference keeps the connection open. A closed one would be an answer.
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "postroad: interrupted\n")


def test_ctrl_c_during_imports_gets_a_line_too() -> None:
    script = """if True:
        import runpy, sys

        class Interrupted:
            def find_spec(self, name, path, target=None):
                if name == "services.cli.errors":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupted())
        runpy.run_module("services.cli", run_name="__main__", alter_sys=True)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "postroad: interrupted\n")


def test_a_closed_pipe_ends_the_command_silently(postroad: Command) -> None:
    process = postroad.start("--help")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(30) == 1
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_help_has_examples_and_loads_nothing_heavy(postroad: Command) -> None:
    """The help is fast: it imports neither gRPC nor Kafka, SQLAlchemy or the settings."""
    for name in (
        "create",
        "list",
        "get",
        "watch",
        "retry",
        "cancel",
        "resolve",
        "lag",
        "migrate",
        "topics apply",
        "topics check",
    ):
        done = postroad(*name.split(), "--help")
        assert done.code == 0
        assert f"postroad {name} " in done.out.partition("Examples:")[2] + " ", name
        assert max(map(len, done.lines)) <= 80
    code = "import sys, services.cli.main; print([m for m in HEAVY if m in sys.modules])"
    heavy = ["grpc", "confluent_kafka", "sqlalchemy", "pydantic", "google.protobuf", "rich.table"]
    script = code.replace("HEAVY", repr(heavy))
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_resolve_needs_a_resolution(postroad: Command) -> None:
    done = postroad("resolve", "019ab3c4-5d6e-7f80-9a1b-2c3d4e5f6071")
    assert done.code == 2
    assert "--not-sent" in done.err


def test_completion_knows_commands_and_statuses(postroad: Command) -> None:
    asked = {"_POSTROAD_COMPLETE": "complete_bash"}
    done = postroad(**asked, COMP_WORDS="postroad reso", COMP_CWORD="1")
    assert done.out.split() == ["resolve"]
    done = postroad(**asked, COMP_WORDS="postroad ca", COMP_CWORD="1")
    assert done.out.split() == ["cancel"]
    done = postroad(**asked, COMP_WORDS="postroad list --status unc", COMP_CWORD="3")
    assert done.out.split() == ["uncertain"]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("replay mail.", ["mail.sent", "mail.deferred", "mail.failed"]),
        ("replay mx.ok --status c", ["completed", "cancelled"]),
        ("replay mx.ok --reopen de", ["deferred"]),
        ("dead list --stage s", ["sender", "status"]),
        ("dead purge --stage v", ["validator"]),
        ("lag --stage v", ["validator"]),
    ],
)
def test_completion_knows_an_argument_s_values(postroad: Command, typed: str, words: list[str]) -> None:
    asked = {"_POSTROAD_COMPLETE": "complete_bash"}
    done = postroad(**asked, COMP_WORDS=f"postroad {typed}", COMP_CWORD=str(len(typed.split())))
    assert (done.out.split(), done.err) == (words, "")


@pytest.mark.parametrize("name", ["retry", "cancel", "resolve --sent"])
def test_without_ids_on_stdin_a_command_does_nothing(postroad: Command, name: str) -> None:
    """With xargs the command would run without a task, and fail."""
    done = postroad(*name.split(), "-", "--api", AWAY, given="\n")
    assert (done.code, done.err) == (0, "")
    one = postroad(*name.split(), "-", "--api", AWAY, given=f"{ID}\n")
    assert one.code == UNAVAILABLE


class Refused(grpc.RpcError):
    """An answer of the api without a valid token."""

    def __init__(self, reason: str) -> None:
        status = status_pb2.Status(code=16, message="the metadata key authorization must be 'Bearer TOKEN'")
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="postroad"))
        self._status = status

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAUTHENTICATED

    def details(self) -> str:
        return self._status.message

    def trailing_metadata(self) -> list[tuple[str, bytes]]:
        return [("grpc-status-details-bin", self._status.SerializeToString())]


@pytest.mark.parametrize("reason", ["TOKEN_MISSING", "TOKEN_UNKNOWN"])
def test_a_refused_token_names_what_the_user_sets(reason: str) -> None:
    failure = explain(Refused(reason))
    assert failure is not None
    assert (failure.code, "POSTROAD_TOKEN" in failure.line, "metadata" in failure.line) == (4, True, False)
