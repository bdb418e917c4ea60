"""One run: it starts the stack, adds load and faults, waits for the end, and judges the evidence."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.chaos.checker import TERMINAL, Evidence, Verdict, check, load_evidence, task_of
from tests.chaos.collect import Api, Log, row_of
from tests.chaos.history import History, load, save
from tests.chaos.load import Load
from tests.chaos.nemesis import Nemesis
from tests.chaos.plan import Fault
from tests.chaos.recipients import end_of
from tests.chaos.recovery import serves_again
from tests.chaos.system import System

__all__ = ["Run", "judge", "run"]

FILES = ("history", "tasks", "journal", "timelines", "topics", "summary")
# Seconds for the first tasks to complete, and for the groups to commit what is settled.
WARM, COMMIT = 120.0, 30.0


@dataclass(frozen=True, slots=True)
class Run:
    """The parameters of a run.

    `slack` is how many seconds longer than promised a recovery may take, on a busy machine. All tasks must be
    settled `settle` seconds after the last fault.
    """

    seed: int
    seconds: float
    faults: Sequence[Fault]
    rate: float = 40.0
    disks: bool = False
    mutant: str = ""
    slack: float = 0.0
    settle: float = 60.0
    kafka_nodes: int = 3


def run(spec: Run, folder: Path, say: Callable[[str], None] = print) -> tuple[Verdict, Evidence]:
    """Carry out a run. `folder` then holds its files and the logs of all processes. Blocks for minutes."""
    history = History(folder / "history.jsonl")
    history.write("run", seed=spec.seed, seconds=spec.seconds, rate=spec.rate)
    save(folder / "plan.jsonl", (asdict(fault) for fault in spec.faults))
    system = System(
        folder / "stack", history, disks=spec.disks, mutant=spec.mutant, kafka_nodes=spec.kafka_nodes
    )
    good = False
    try:
        system.up()
        say(f"{history.now():7.1f}  the stack is up")
        asyncio.run(_go(spec, system, history, folder, say))
        verdict, evidence = judge(folder, spec.slack)
        good = verdict.ok
    finally:
        system.down(keep=not good)
        history.close()
    return verdict, evidence


def judge(folder: Path, slack: float = 0.0) -> tuple[Verdict, Evidence]:
    """Return the verdict on a run and its evidence, from the files in its folder."""
    files = {name: load(folder / f"{name}.jsonl") for name in FILES}
    emails = {entry["email"] for entry in files["history"] if entry["what"] == "create"}
    evidence = load_evidence(files, {email: end_of(email) for email in emails})
    return check(evidence, slack), evidence


async def _go(spec: Run, system: System, history: History, folder: Path, say: Callable[[str], None]) -> None:
    work = Load(system.targets, spec.rate, spec.seed, history)
    nemesis = Nemesis(system, spec.faults, work, history, say, slack=spec.slack)
    loading = asyncio.create_task(work.run())
    try:
        # Everything must work before the first fault: a cold start is no recovery.
        started = time.time()
        served = await serves_again(system.targets, started, WARM)
        if served is None:
            raise RuntimeError(f"not every partition was served within {WARM:g} s of the start")
        say(f"{history.now():7.1f}  every partition is served, {served - started:.1f} s after the first task")
        await nemesis.run()
        rest = spec.seconds - (time.time() - nemesis.began)
        await asyncio.sleep(max(0.0, rest))
    finally:
        work.end()
        await nemesis.close()
        await loading
    say(f"{history.now():7.1f}  {work.created} tasks created; waiting for their ends")
    await asyncio.to_thread(_collect, system, history, folder, nemesis.healed + spec.settle)


def _collect(system: System, history: History, folder: Path, end: float) -> None:
    api = Api(system.direct)
    open_ = ["pending", "processing"]
    while api.tasks(status=open_) and time.time() < end:
        time.sleep(0.5)
    history.write("settled", left=len(api.tasks(status=open_)))
    collected = time.time()
    rows = [row_of(task) for task in api.tasks()]
    save(folder / "tasks.jsonl", rows)
    journal = system.journal()
    save(folder / "journal.jsonl", journal)
    often: dict[str, int] = {}
    for line in journal:
        id_ = task_of(str(line["message_id"]))
        often[id_] = often.get(id_, 0) + 1
    suspects = {id_ for id_, count in often.items() if count > 1}
    suspects |= {row["id"] for row in rows if row["status"] not in TERMINAL}
    save(folder / "timelines.jsonl", (_timeline(api, id_) for id_ in suspects & {row["id"] for row in rows}))
    if left := [row["id"] for row in rows if row["status"] not in TERMINAL][:100]:
        save(folder / "inside.jsonl", [system.inside(left)])
    log = Log(system.bootstrap)
    try:
        end = time.time() + COMMIT
        while any((lag := log.lag()).values()) and time.time() < end:
            time.sleep(0.5)
        save(folder / "topics.jsonl", ({"topic": t, "tasks": ids} for t, ids in log.published().items()))
        save(folder / "summary.jsonl", [{"collected": collected, "lag": lag, "dead": log.dead()}])
    finally:
        log.close()


def _timeline(api: Api, id_: str) -> dict[str, object]:
    task = api.get(id_)
    return {
        "id": id_,
        "doubts": [e.detail.rpartition(" ")[2] for e in task.timeline if e.kind == "in_doubt"],
        "timeline": [
            f"{e.at.ToMicroseconds() / 1e6:.3f} {e.stage} {e.kind} {e.attempt} {e.reply} {e.detail}"
            for e in task.timeline
        ],
    }


def discard(folder: Path) -> None:
    """Delete the files and the logs of a run."""
    shutil.rmtree(folder, ignore_errors=True)


def can_mount() -> bool:
    """Return whether a run can fill disks: it mounts small file systems for that, as root."""
    return os.geteuid() == 0 and shutil.which("mount") is not None
