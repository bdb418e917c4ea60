"""The archive of Kafka's classes, without which Kafka only starts more slowly."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local import kafka_java
from deploy.local.commands import SetupError


def test_a_failed_trial_start_is_a_warning_and_leaves_no_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def fail(argv: list[str], port: int) -> None:
        raise SetupError("a trial start of Kafka failed")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kafka_java, "make_jars", lambda: made.append("jars"))
    monkeypatch.setattr(kafka_java, "storage_format", lambda *_: None)
    monkeypatch.setattr(kafka_java, "_run_broker", fail)
    kafka_java.make_archive()
    assert made == ["jars"]
    assert not kafka_java.archive_path().exists()
    assert capsys.readouterr().err == (
        "setup: made no class archive for Kafka (a trial start of Kafka failed);"
        " each start takes a second longer\n"
    )


def test_missing_jars_fail_the_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise SetupError("Maven failed")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kafka_java, "make_jars", fail)
    with pytest.raises(SetupError, match="Maven failed"):
        kafka_java.make_archive()
