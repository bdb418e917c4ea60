"""A pid file of the local stack names a process that runs, or one that crashed or was killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import process
from deploy.local.layout import Layout
from deploy.local.stack import Stack


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout = Layout(tmp_path)
    yield layout
    for name in process.find_all(layout):
        process.end(layout, name, 0)


def _begin(layout: Layout, *names: str) -> None:
    for name in names:
        process.spawn(layout, name, ["sleep", "600"], {})


def _begin_ignoring_sigterm(layout: Layout, name: str) -> None:
    # A child inherits the signals that its parent ignores.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _begin(layout, name)
    finally:
        signal.signal(signal.SIGTERM, before)


def _files(layout: Layout) -> list[str]:
    return layout.names_in("pids", ".pid")


def test_stop_leaves_no_pid_file_and_kill_leaves_it(layout: Layout) -> None:
    _begin(layout, "dns", "catcher")
    stack = Stack(layout)
    stack.stop("catcher", kill=True)
    assert _files(layout) == ["catcher", "dns"]
    assert stack.stop("dns")
    assert _files(layout) == ["catcher"]
    assert stack.stop("catcher")
    assert _files(layout) == []


def test_stop_of_a_process_that_ignores_sigterm_leaves_no_pid_file(layout: Layout) -> None:
    _begin_ignoring_sigterm(layout, "dns")
    assert not process.end(layout, "dns", 0.1)
    assert _files(layout) == []


def test_scale_leaves_no_pid_file_of_a_surplus_replica(layout: Layout) -> None:
    _begin(layout, "sender-1", "sender-2", "status-1")
    process.end(layout, "sender-2", 0)
    stack = Stack(layout)
    stack.scale("sender", 0)
    assert _files(layout) == ["status-1"]
    assert list(process.find_all(layout)) == ["status-1"]


def test_status_shows_stopped_processes(layout: Layout) -> None:
    _begin(layout, "dns", "catcher")
    stack = Stack(layout)
    stack.stop("dns")
    assert {row.name: bool(row.pid) for row in stack.processes() if row.name in ("dns", "catcher")} == {
        "dns": False,
        "catcher": True,
    }


def test_an_end_that_takes_long_is_named(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "_SILENCE", 0.05)
    _begin_ignoring_sigterm(layout, "dns")
    assert not process.end(layout, "dns", 0.1)
    assert "dns still drains" in capsys.readouterr().err
