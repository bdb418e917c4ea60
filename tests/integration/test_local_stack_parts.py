"""The parts of the local stack and its installer that need no server."""

import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest

from deploy.local import cache, database_tree, debian, demo, preparation
from deploy.local.command_line import main
from deploy.local.commands import SetupError, run
from deploy.local.demo_cases import CASES, plan
from deploy.local.environment import (
    given_variables,
    is_replaced,
    merge_given,
    refuse_private,
    service_environment,
    stack_environment,
    without_settings,
)
from deploy.local.layout import Layout
from deploy.local.ports import claim, free_port, is_free, release
from deploy.local.stack import Stack, StackError
from deploy.local.state import StackState
from deploy.local.zone import misbehaviour


def test_without_given_variables_the_settings_are_the_stacks_own() -> None:
    state = StackState()
    own = stack_environment(state)
    assert given_variables(state, own) == {}
    assert given_variables(state, {**own, "EMAIL_HOST": "", "HOME": "/root"}) == {}
    operators = {"POSTROAD_PROFILE": "production", "POSTROAD_ENV_FILE": "x.env", "POSTROAD_TOKEN": "secret"}
    assert given_variables(state, {**own, **operators}) == {}
    assert not any(is_replaced(state, process) for process in ("kafka", "mysql", "dns", "catcher", "api"))


def test_given_variables_win_but_private_ones_do_not() -> None:
    state = StackState(replicas={"sender": 1})
    environ = {
        "EMAIL_PORT": "2525",
        "EMAIL_USER": "post",
        "POSTROAD_REPLICATION": "2",
        "POSTROAD_REPLICA": "mine",
        "POSTROAD_LISTEN": "0.0.0.0:1",
        "POSTROAD_HTTP_LISTEN": "0.0.0.0:2",
        "POSTROAD_HTTP_SENDER_1": "0.0.0.0:3",
        "POSTROAD_LOCAL_DIR": "/elsewhere",
    }
    state.given = given_variables(state, environ)
    assert state.given == {"EMAIL_PORT": "2525", "EMAIL_USER": "post", "POSTROAD_REPLICATION": "2"}
    variables = service_environment(state, "sender-1")
    assert variables["EMAIL_PORT"] == "2525"
    assert variables["POSTROAD_REPLICA"] == "sender-1"
    assert variables["POSTROAD_HTTP_LISTEN"] == variables["POSTROAD_HTTP_SENDER_1"] != "0.0.0.0:3"
    assert "POSTROAD_LISTEN" not in variables
    assert is_replaced(state, "catcher")
    assert "EMAIL_TLS" not in variables


@pytest.mark.parametrize("name", ["POSTROAD_LISTEN", "POSTROAD_HTTP_LISTEN", "POSTROAD_REPLICA"])
def test_up_refuses_a_setting_that_the_stack_chooses_itself(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "127.0.0.1:50052")
    with pytest.raises(ValueError, match=f"{name} is set.*POSTROAD_LOCAL_API_PORT chooses the api's port"):
        Stack(Layout(tmp_path)).up({}, None)


def test_a_shell_that_has_read_the_settings_of_the_stack_is_not_refused() -> None:
    refuse_private(stack_environment(StackState(replicas={"api": 1, "sender": 1})))


def test_a_line_says_where_the_api_is_when_another_has_its_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = Stack(Layout(tmp_path))
    stack.state.replicas = {"api": 1}
    port = stack.state.port("api-1", "grpc")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setenv("POSTROAD_LOCAL_API_PORT", str(taken))
        assert stack.api_elsewhere() == f"{taken} is taken; api-1 is at 127.0.0.1:{port}"
    for wanted in ("0", str(port)):
        monkeypatch.setenv("POSTROAD_LOCAL_API_PORT", wanted)
        assert not stack.api_elsewhere()


@pytest.mark.parametrize(("count", "warned"), [(12, False), (13, True)])
def test_scale_warns_about_replicas_without_partitions(
    count: int,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def scale(self: Stack, service: str, count: int) -> None:
        self.state.replicas[service] = count

    monkeypatch.setattr(Stack, "scale", scale)
    monkeypatch.setenv("POSTROAD_LOCAL_DIR", str(tmp_path))
    assert main(["scale", "sender", str(count)]) == 0
    assert ("only 12 of them get partitions" in capsys.readouterr().err) is warned


def test_the_error_for_a_wrong_setting_begins_with_its_name() -> None:
    with pytest.raises(StackError, match=r"\APOSTROAD_DNS_TIMEOUT: "):
        preparation.migrate({"POSTROAD_DNS_TIMEOUT": "abc"})


def test_up_says_that_it_takes_the_tokens_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Stack, "_bring_up", lambda *_, **__: None)
    monkeypatch.setenv("POSTROAD_LOCAL_API_PORT", "0")
    stack = Stack(Layout(tmp_path))
    for tokens in ("billing:4f1c09ab77d2e6b5", ""):
        assert not capsys.readouterr().err
        monkeypatch.setenv("POSTROAD_API_TOKENS", tokens)
        stack.up({}, None)
    assert capsys.readouterr().err == "the api needs no token now\n"


def test_a_variable_set_to_the_stacks_own_value_is_no_longer_given() -> None:
    state = StackState(given={"EMAIL_USER": "post", "POSTROAD_SENDER_DELAYS": "9"})
    environ = {"POSTROAD_SENDER_DELAYS": stack_environment(StackState())["POSTROAD_SENDER_DELAYS"]}
    assert merge_given(state, environ) == {"EMAIL_USER": "post"}
    assert merge_given(state, {"EMAIL_PASS": "p"}) == {**state.given, "EMAIL_PASS": "p"}
    assert merge_given(state, stack_environment(state)) == state.given


def test_a_process_gets_no_setting_from_its_own_shell() -> None:
    environ = {"EMAIL_FROM": "x", "POSTROAD_TOKEN": "x", "POSTROAD_LOCAL_DIR": "/x", "HOME": "/root"}
    assert without_settings(environ) == {"POSTROAD_LOCAL_DIR": "/x", "HOME": "/root"}


def test_the_demo_explains_how_to_unset_another_mail_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does so even when the variable is unset by now, since the stack remembers it."""
    for name in list(os.environ):
        if name.startswith(("POSTROAD_", "EMAIL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("POSTROAD_LOCAL_DIR", str(tmp_path))
    StackState(given={"EMAIL_HOST": "relay.example"}).save(tmp_path / "state.json")
    assert demo.main() == 1
    errors = capsys.readouterr().err
    assert "EMAIL_HOST" in errors
    assert "make down" in errors


def test_a_given_relay_replaces_the_catchers_settings_only() -> None:
    state = StackState(given={"EMAIL_HOST": "relay.example"})
    env = stack_environment(state)
    assert (env["EMAIL_HOST"], env["EMAIL_PORT"]) == ("relay.example", "25")
    assert not is_replaced(state, "dns")


def test_ports_are_remembered_and_distinct(tmp_path: Path) -> None:
    state = StackState(kafka_nodes=3, replicas={"api": 2, "sender": 3})
    env = stack_environment(state)
    state.save(tmp_path / "state.json")
    assert stack_environment(StackState.load(tmp_path / "state.json")) == env
    used = [port for uses in state.ports.values() for port in uses.values()]
    assert len(set(used)) == len(used)


def test_the_first_api_takes_the_preferred_port_when_it_is_free() -> None:
    wanted = free_port(())
    release([wanted])
    with socket.socket() as other:
        other.bind(("127.0.0.1", wanted))
        state = StackState(replicas={"api": 2})
        state.prefer_api_port(wanted)
        state.choose_ports()
        assert wanted not in {state.port(name, "grpc") for name in ("api-1", "api-2")}
    before = state.port("api-2", "grpc")
    state.prefer_api_port(wanted)
    state.choose_ports()
    assert (state.port("api-1", "grpc"), state.port("api-2", "grpc")) == (wanted, before)
    # Another stack that starts at the same moment must not choose it too.
    assert not claim(wanted)
    state.release_ports()
    assert claim(wanted)
    release([wanted])


def test_an_ended_service_gives_up_a_port_that_another_took() -> None:
    """While servers run, an `up` after a failed one must still find the api another port."""
    state = StackState(replicas={"api": 1})
    state.choose_ports()
    ports = {name: dict(uses) for name, uses in state.ports.items()}
    with socket.socket() as api, socket.socket() as dns:
        api.bind(("127.0.0.1", ports["api-1"]["grpc"]))
        dns.bind(("127.0.0.1", ports["dns"]["dns"]))
        state.drop_busy_ports({"mysql", "api-1"})
        assert state.ports == ports
        state.drop_busy_ports({"mysql"})
        state.choose_ports()
        assert state.port("api-1", "grpc") != ports["api-1"]["grpc"]
        # The processes that run have the servers' addresses.
        assert state.port("dns", "dns") == ports["dns"]["dns"]


@pytest.mark.parametrize("port", ["x", "-1", "65536"])
def test_a_wrong_port_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, port: str) -> None:
    monkeypatch.setenv("POSTROAD_LOCAL_API_PORT", port)
    with pytest.raises(StackError, match="POSTROAD_LOCAL_API_PORT"):
        Stack(Layout(tmp_path)).up({}, None)


def test_logs_without_a_name_shows_the_end_of_each_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POSTROAD_LOCAL_DIR", str(tmp_path))
    layout = Layout(tmp_path)
    layout.log("dns").parent.mkdir()
    for name in ("dns", "api-1"):
        layout.log(name).write_text("".join(f"{name} line {number}\n" for number in range(100)))
    assert main(["logs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "==> api-1 <=="
    assert lines[lines.index("==> dns <==") - 1] == "api-1 line 99"
    assert lines[-1] == "dns line 99"
    assert len(lines) < 50


def test_free_ports_are_below_those_of_outgoing_connections() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(50):
        port = free_port(())
        assert port < lowest
        assert is_free(port)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (
            "sources.list",
            "# deb http://wrong/ {suite} main\ndeb [signed-by=/a arch=b] http://right/debian {suite} main\n",
        ),
        (
            "sources.list.d/debian.sources",
            "# a comment\nTypes: deb\nURIs: http://right/debian\nSuites: {suite} {suite}-updates\n"
            "Components:\n main\n contrib\nSigned-By: /x\n",
        ),
        (
            "sources.list.d/debian.sources",
            "Types: deb\nEnabled: no\nURIs: http://wrong/\nSuites: {suite}\nComponents: main\n\n"
            "Types: deb-src\nURIs: http://wrong/\nSuites: {suite}\nComponents: main\n\n"
            "Types: deb deb-src\nURIs: http://right/debian\nSuites: {suite}\nComponents: main\n",
        ),
    ],
)
def test_the_mirror_is_the_machines_own(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "aaa.list").write_text("deb http://other/repo stable-tools main\n")
    (tmp_path / file).write_text(text.format(suite="stable"))
    assert debian.mirror(tmp_path) == "http://right/debian"


def test_a_missing_mirror_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="mirror"):
        debian.mirror(tmp_path)


@pytest.mark.parametrize(
    ("release", "fetched"),
    [
        ("ID=debian\nVERSION_CODENAME=trixie\n", True),
        ("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n", False),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', False),
        ("ID=fedora\n", False),
    ],
)
def test_mysql_is_fetched_from_debians_mirrors_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, fetched: bool
) -> None:
    (tmp_path / "os-release").write_text(release)
    monkeypatch.setattr(debian, "OS_RELEASE", tmp_path / "os-release")
    monkeypatch.setattr(debian.shutil, "which", lambda *_, **__: "/usr/bin/apt-get")
    monkeypatch.setattr(database_tree, "find_server", lambda _: None)
    asked = []
    monkeypatch.setattr(database_tree, "make_entry", lambda *_: asked.append("mysql"))
    # The error says what to do.
    with pytest.raises(SetupError, match=r"MySQL 8\.4.*mysqld.*PATH.*POSTROAD_LOCAL_DB=mariadb"):
        database_tree.make_server("mysql")
    assert bool(asked) == fetched


def test_a_failed_command_is_repeated_and_its_output_is_in_the_error(tmp_path: Path) -> None:
    counted = tmp_path / "tries"
    with pytest.raises(SetupError, match="no luck"):
        run(["sh", "-c", f"echo x >> {counted}; echo no luck >&2; exit 3"], tries=2)
    assert counted.read_text() == "x\nx\n"
    with pytest.raises(SetupError, match="not installed"):
        run(["no-such-program-anywhere"])


def _build(target: Path) -> None:
    with (target.parent / "builds").open("a") as builds:
        builds.write("x")
    (target / "half").touch()
    time.sleep(0.2)
    (target / "whole").touch()


def _make(root: str) -> None:
    os.environ["XDG_CACHE_HOME"] = root
    assert (cache.make_entry("thing", b"recipe", _build) / "whole").exists()


def test_two_clones_at_once_build_an_entry_once(tmp_path: Path) -> None:
    both = [
        multiprocessing.get_context("spawn").Process(target=_make, args=(str(tmp_path),)) for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / "postroad" / "builds").read_text() == "x"


def test_a_failed_build_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def build(target: Path) -> None:
        (target / "half").touch()
        raise SetupError("the mirror is gone")

    with pytest.raises(SetupError, match="gone"):
        cache.make_entry("thing", b"recipe", build)
    assert not cache.entry_path("thing", b"recipe").exists()
    assert [path.suffix for path in (tmp_path / "postroad").iterdir()] == [".lock"]


def test_the_demo_has_every_case_once_before_any_repeats() -> None:
    sent = list(plan("run", 30))
    assert [one.case for one in sent] == [CASES[number % len(CASES)] for number in range(30)]
    assert len({one.address for one in sent}) == 30


@pytest.mark.parametrize(
    ("label", "kind", "milliseconds", "first"),
    [
        ("servfail", "servfail", 0, 0),
        ("delay-250", "delay", 250, 0),
        ("flaky", "servfail", 0, 1),
        ("flaky-3", "servfail", 0, 3),
    ],
)
def test_misbehaving_labels(label: str, kind: str, milliseconds: int, first: int) -> None:
    found = misbehaviour(label)
    assert found
    assert (found.kind, found.milliseconds, found.first) == (kind, milliseconds, first)
    assert misbehaviour(f"{label}x") is None
