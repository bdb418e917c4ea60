"""docs/add-a-stage.md: its archiver runs, and the rest of the project finds it in the list of stages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from postroad.v1 import events_pb2 as pb
from services.common.events import encode
from tests.integration import stage_facts
from tests.stack import Infra

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/add-a-stage.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def _replace(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a copy of this project with the page's changes; the other files are links."""
    root = tmp_path / "project"
    common = root / "services" / "common"
    common.mkdir(parents=True)
    for folder in (root, root / "services", common):
        for path in (ROOT / folder.relative_to(root)).iterdir():
            if not (folder / path.name).exists() and not path.name.startswith("."):
                (folder / path.name).symlink_to(path)
    service, entry = _blocks("python")
    (root / "services" / "archiver.py").write_text(service)
    _edit(
        common / "stages.py",
        lambda text: _replace(text, "    )\n}\n", f"        {entry.strip()},\n    )\n}}\n"),
    )
    container, volume = _blocks("yaml")
    _edit(
        root / "compose.yaml",
        lambda text: _replace(text, "\nvolumes:\n", f"\n{container}\nvolumes:\n{volume}"),
    )
    return root


def _edit(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text()
    path.unlink()
    path.write_text(change(text))


def _python(project: Path, environment: Mapping[str, str], *arguments: str) -> Any:
    """Run Python in the project; return what it printed as JSON."""
    argv = [sys.executable, *arguments]
    done = subprocess.run(argv, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _until(met: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.05)


def test_the_archiver_of_the_page_runs_and_is_known_everywhere(infra: Infra, project: Path) -> None:
    prefix, archive = infra.topic_prefix(), project / "archive"
    archive.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("POSTROAD_", "EMAIL_"))},
        "POSTROAD_KAFKA_BOOTSTRAP": infra.bootstrap,
        "POSTROAD_TOPIC_PREFIX": prefix,
        "POSTROAD_PARTITIONS": "1",
        "POSTROAD_DATABASE_URL": "mysql+mysqlconnector://nobody@127.0.0.1:1/none",
        "POSTROAD_CONFIG": os.devnull,
        # The links to this project's bytecode are read, never written.
        "PYTHONDONTWRITEBYTECODE": "1",
        "ARCHIVE_DIRECTORY": str(archive),
    }
    found = _python(project, environment, "-m", stage_facts.__name__)
    assert f"{prefix}archiver.dead" in found["created"]
    assert found["name"] == "archiver-1"
    assert found["argv"][1:] == ["-m", "services.archiver"]
    assert {("kill", "archiver-1"), ("freeze", "archiver-2"), ("scale", "archiver")} <= set(
        map(tuple, found["faults"])
    )
    assert found["missing"] == []

    event = pb.MailSent(id=uuid.uuid4().bytes, attempt=1, message_id="<m@a.test>", at_us=1)
    record = encode(event, "sender")
    producer = Producer({"bootstrap.servers": infra.bootstrap})
    producer.produce(prefix + record.topic, record.value, record.key, headers=record.headers)  # type: ignore[arg-type]
    assert producer.flush(20) == 0

    def metrics() -> str:
        try:
            with urllib.request.urlopen(f"http://{found['address']}/metrics", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    done = 'postroad_stage_records_total{outcome="done",stage="archiver"} 1.0'
    process = subprocess.Popen(found["argv"], cwd=project, env={**environment, **found["env"]})
    try:
        _until(lambda: done in metrics() or process.poll() is not None)
        [line] = (archive / "mail.sent.archiver-1.jsonl").read_text().splitlines()
        assert json.loads(line)["id"] == str(uuid.UUID(bytes=event.id))

        lag = _python(project, environment, "-m", "services.cli", "lag", "--interval", "0", "-o", "json")
        [row] = [row for row in lag["stages"] if row["stage"] == "archiver"]
        assert row["partitions"] == 1
        assert [member["client"].startswith("archiver-1") for member in row["members"]] == [True]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
