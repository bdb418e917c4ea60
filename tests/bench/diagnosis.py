"""Where a load's time goes: a profile of one process, MySQL's statements, Kafka's requests.

Each costs CPU itself, so none is on in a run whose figures count. py-spy samples the profiled process. The
statements are those of the database's digests. The requests are those that the broker logs, with the client
that sent them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.servers import Installation, Servers

__all__ = ["Diagnosis", "count_requests", "digests", "given"]

# By the suffix of the file: what py-spy writes.
_FORMATS = {".svg": "flamegraph", ".json": "speedscope", ".txt": "raw"}
_RATE = 200
_SHOWN = 25
_DIGESTS = "performance_schema.events_statements_summary_by_digest"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What to look at besides the figures: the replica to profile (`sender-1`), statements, requests."""

    profile: str = ""
    profile_file: Path | None = None
    profile_options: tuple[str, ...] = ()
    statements: bool = False
    requests: bool = False

    @contextmanager
    def around(self, installation: Installation, label: str) -> Iterator[list[str]]:
        """Look during the block; at its end the list has the lines to print."""
        lines: list[str] = []
        servers = installation.servers
        log = servers.directory / "logs" / "kafka-1.log"
        with ExitStack() as parts:
            if self.statements:
                _reset_digests(servers)
            start = log.stat().st_size
            if self.profile:
                lines.append(parts.enter_context(self._profiled(installation, label)))
            created = installation.created
            yield lines
            tasks = installation.created - created
            if self.statements:
                lines += digests(servers, installation.name, tasks)
            if self.requests:
                with log.open(errors="replace") as file:
                    file.seek(start)
                    lines += count_requests(file, tasks)

    @contextmanager
    def _profiled(self, installation: Installation, label: str) -> Iterator[str]:
        file = self.profile_file or Path(f"{self.profile}.svg")
        file = file.with_stem(f"{file.stem}-{label.replace(' ', '-').replace('/', '-')}")
        form = _FORMATS.get(file.suffix, "raw")
        spy, pid = Path(sys.executable).with_name("py-spy"), installation.pid(self.profile)
        argv = [
            str(spy), "record", "--pid", str(pid),
            "--rate", str(_RATE), "--format", form, "--output", str(file), "--duration", "unlimited",
            *self.profile_options,
        ]  # fmt: skip
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
            try:
                yield f"profile of {self.profile}: {file}"
            finally:
                running.send_signal(signal.SIGINT)
                _, output = running.communicate()
        if running.returncode:
            raise RuntimeError(f"py-spy failed: {output}")


def given(diagnosis: Diagnosis) -> dict[str, str]:
    """Return the variables with which the local stack's servers allow this."""
    return {
        name: "1"
        for name, wanted in (
            ("POSTROAD_LOCAL_STATEMENT_DIGESTS", diagnosis.statements),
            ("POSTROAD_LOCAL_REQUEST_LOG", diagnosis.requests),
        )
        if wanted
    }


def _reset_digests(servers: Servers) -> None:
    with servers.connection() as connection, connection.cursor() as cursor:
        cursor.execute(f"TRUNCATE TABLE {_DIGESTS}")


def digests(servers: Servers, schema: str, tasks: int) -> list[str]:
    """Return a line for each statement since the digests were reset, the costliest first."""
    with servers.connection() as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT COUNT_STAR, SUM_TIMER_WAIT / 1e6, SUM_ROWS_AFFECTED + SUM_ROWS_SENT, DIGEST_TEXT"
            f" FROM {_DIGESTS} WHERE SCHEMA_NAME = %s ORDER BY SUM_TIMER_WAIT DESC LIMIT {_SHOWN}",
            (schema,),
        )
        rows = cursor.fetchall()
    lines = ["statements: times, microseconds each, microseconds a task, rows each"]
    for count, micros, affected, text in rows:
        lines.append(
            f"  {count:8} {float(micros) / count:10.1f} {float(micros) / tasks:8.1f}"
            f" {float(affected) / count:8.1f}  {' '.join(str(text).split())[:150]}"
        )
    return lines


def count_requests(log: Iterable[str], tasks: int) -> list[str]:
    """Return a line for each kind of request and client in a broker's request log, most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in log:
        _, found, text = line.partition("Completed request:")
        if found and (name := _kind(text)):
            counts[name] += 1
    lines = ["requests to Kafka: count, count a task, kind, client"]
    for (kind, client), count in counts.most_common(_SHOWN):
        lines.append(f"  {count:8} {count / tasks:8.4f}  {kind:28} {client}")
    total = sum(counts.values())
    return [*lines, f"  {total:8} {total / tasks:8.4f}  all"]


def _kind(text: str) -> tuple[str, str] | None:
    try:
        header = json.loads(text)["requestHeader"]
    except (ValueError, KeyError):
        return None
    return header["requestApiKeyName"], header["clientId"]
