"""`make demo`: bring the stack up, send mails that end in every way, and watch them settle.

`DEMO_TASKS=n` sends n mails instead of a dozen. The demo exits with 0 when every task ended as it must and
the catcher's journal agrees, with 1 otherwise. The stack stays up.
"""

import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from deploy.local.commands import SetupError
from deploy.local.demo_cases import CASES, DemoMail, plan
from deploy.local.environment import REPLACED_BY, merge_given, stack_environment
from deploy.local.layout import Layout
from deploy.local.stack import Stack, StackError
from postroad.v1 import task_pb2, task_service_pb2, task_service_pb2_grpc
from services.common.statuses import FINAL_STATUSES

__all__ = ["main"]

CALLERS = 64
LOOK = 0.25
TIMEOUT = 60.0
# Mails a second that even a busy machine sends.
SLOWEST_RATE = 50
ROWS_SHOWN = 24
STYLES = {"completed": "green", "failed": "red", "uncertain": "yellow", "cancelled": "yellow"}

Tasks = dict[str, task_pb2.Task]


class Demo:
    """One run of the demo on a stack that is up."""

    def __init__(self, stack: Stack, count: int) -> None:
        env = stack_environment(stack.state)
        self.address = env["POSTROAD_API"]
        self._channel = grpc.insecure_channel(self.address)
        self._api = task_service_pb2_grpc.TaskServiceStub(self._channel)
        _, _, token = env.get("POSTROAD_API_TOKENS", "").partition(",")[0].partition(":")
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None
        self.run = f"{int(time.time()):x}{secrets.token_hex(2)}"
        self.sent: dict[str, DemoMail] = {}
        self._journal = stack.layout.mail / "journal.jsonl"
        self._plan = list(plan(self.run, count))

    def create(self) -> None:
        """Create a task for each mail of the plan. Blocks; raises grpc.RpcError."""

        def create(sent: DemoMail) -> str:
            data = task_service_pb2.TaskData(
                email=sent.address,
                subject=f"Postroad demo: {sent.case.text}",
                body=f"This mail plays: {sent.case.text}.\n",
                labels={"demo": self.run},
            )
            request = task_service_pb2.CreateRequest(data=data, idempotency_key=sent.address)
            return str(self._api.Create(request, timeout=30, metadata=self._metadata).id)

        with ThreadPoolExecutor(CALLERS) as pool:
            self.sent = dict(zip(pool.map(create, self._plan), self._plan, strict=True))

    def tasks(self) -> Tasks:
        """Return all tasks of this run from the List RPC, oldest first."""
        found: list[task_pb2.Task] = []
        token = ""
        while True:
            request = task_service_pb2.ListRequest(
                labels={"demo": self.run}, page_size=1000, page_token=token
            )
            page = self._api.List(request, timeout=30, metadata=self._metadata)
            found += page.results
            token = page.next_page_token
            if not token:
                return {task.id: task for task in reversed(found)}

    def watch(self) -> Iterator[Tasks]:
        """Yield the tasks again and again, until all are settled or the time is over."""
        deadline = time.monotonic() + TIMEOUT + len(self.sent) / SLOWEST_RATE
        while True:
            tasks = self.tasks()
            yield tasks
            if len(tasks) == len(self.sent) and all(task.status in FINAL_STATUSES for task in tasks.values()):
                return
            if time.monotonic() > deadline:
                return
            time.sleep(LOOK)

    def mistakes(self, tasks: Tasks) -> list[str]:
        """Return a line for each task that did not end as it must."""
        wrong = []
        for task_id, sent in self.sent.items():
            case, task = sent.case, tasks.get(task_id)
            if task is None:
                wrong.append(f"{sent.address}: not listed")
            elif (task.status, task.reason) != (case.status, case.reason):
                wrong.append(f"{sent.address}: {task.status} {task.reason}, not {case.status} {case.reason}")
        return wrong + self._mistakes_in_mail(tasks)

    def _mistakes_in_mail(self, tasks: Tasks) -> list[str]:
        """Return a line for each Message-ID that the catcher took more or less often than expected."""
        entries = map(json.loads, self._journal.read_text().splitlines())
        taken = Counter(entry["message_id"] for entry in entries if self.run in entry["rcpt"])
        right: Counter[str] = Counter()
        for task_id, task in tasks.items():
            right[task.message_id] += self.sent[task_id].case.copies
        return [
            f"mail {message_id}: taken {taken[message_id]} times, not {right[message_id]}"
            for message_id in taken.keys() | right.keys()
            if taken[message_id] != right[message_id]
        ]


def _table(demo: Demo, tasks: Tasks) -> Table:
    """Return a table with a row for each task, or for each case when there are many tasks."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    if len(demo.sent) <= ROWS_SHOWN:
        for column in ("case", "recipient", "status", "reason", "last reply"):
            # A narrow terminal shows long texts in several lines, and nothing is cut.
            table.add_column(column, no_wrap=column in ("status", "reason"), overflow="fold")
        for task_id, sent in demo.sent.items():
            task = tasks.get(task_id, task_pb2.Task())
            style = STYLES.get(task.status, "dim")
            status = f"[{style}]{task.status}[/]"
            table.add_row(sent.case.text, sent.address, status, task.reason, escape(task.reply))
        return table
    for column in ("case", "must end", "sent", "settled"):
        table.add_column(column)
    for case in CASES:
        ids = [task_id for task_id, sent in demo.sent.items() if sent.case is case]
        settled = sum(task_id in tasks and tasks[task_id].status in FINAL_STATUSES for task_id in ids)
        table.add_row(case.text, f"{case.status} {case.reason}", str(len(ids)), str(settled))
    return table


def _show(demo: Demo, console: Console) -> Tasks:
    """Watch until all tasks are settled: a live table on a terminal, a line for each change elsewhere."""
    tasks: Tasks = {}
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for tasks in demo.watch():
                live.update(_table(demo, tasks), refresh=True)
        return tasks
    shown: dict[str, str] = {}
    for tasks in demo.watch():
        for task_id, task in tasks.items():
            state = f"{task.status} {task.reason}".strip()
            if shown.get(task_id) != state and len(demo.sent) <= ROWS_SHOWN:
                print(f"{demo.sent[task_id].case.text:32} {task.email:50} {state}", flush=True)
            shown[task_id] = state
    console.print(_table(demo, tasks))
    return tasks


def _next_steps(stack: Stack, demo: Demo) -> str:
    return f"""
The stack stays up. What to try next:

  python3 -m deploy.local status                      what runs, and how it is
  python3 -m deploy.local scale sender 3              three senders share the work
  python3 -m deploy.local kill sender-1               and what happens when one dies
  python3 -m deploy.local logs sender-1               what it wrote
  make demo DEMO_TASKS=2000                           more of it
  make down                                           stop it all

The API is at {demo.address}; settings: {stack.layout.env}; mail: {stack.layout.mail}
"""


def _replacements(stack: Stack) -> str:
    """Return the variables that name another mail server or DNS, set now or since `up`."""
    given = merge_given(stack.state, os.environ)
    return ", ".join(name for server in ("catcher", "dns") for name in REPLACED_BY[server] if given.get(name))


def main() -> int:
    """Run the demo. Return 0 when every task ended as it must."""
    # A pipe has no width, and rich would cut the rows at 80 columns.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    count = int(os.environ.get("DEMO_TASKS") or len(CASES))
    stack = Stack(Layout.from_environment())
    began = time.monotonic()
    if names := _replacements(stack):
        print(
            f"demo: it needs the stack's own mail server and DNS, and {names} names others:"
            f" unset it, `make down`, then `make demo` again",
            file=sys.stderr,
        )
        return 1
    try:
        console.print("Bringing up Kafka, MySQL, DNS, a mail server and the services ...")
        stack.up({}, None)
    except (StackError, SetupError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    if line := stack.api_elsewhere():
        console.print(line)
    demo = Demo(stack, count)
    console.print(f"Up after {time.monotonic() - began:.1f} s. Sending {count} mails:\n")
    began = time.monotonic()
    demo.create()
    tasks = _show(demo, console)
    mistakes = demo.mistakes(tasks)
    if mistakes:
        print("\n".join(["", "Not as it must be:", *mistakes]), file=sys.stderr)
        return 1
    print(f"\nAll {count} settled as they must after {time.monotonic() - began:.1f} s; the journal agrees.")
    print(_next_steps(stack, demo), end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except grpc.RpcError as error:
        print(f"demo: {error.code().name}: {error.details()}", file=sys.stderr)
        sys.exit(1)
