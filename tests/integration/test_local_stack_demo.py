"""`make demo` succeeds when every task ends as it must, and only then."""

import os
import subprocess
from pathlib import Path

from tests.stack import Stack

ROOT = Path(__file__).resolve().parents[2]


def _demo(stack: Stack, count: int) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("POSTROAD_", "EMAIL_"))}
    return subprocess.run(
        # `make test` has run the setup already.
        ["make", "-o", "setup", "demo"],
        env={**clean, "POSTROAD_LOCAL_DIR": str(stack.directory), "DEMO_TASKS": str(count)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_every_case_ends_as_it_must(stack: Stack) -> None:
    done = _demo(stack, 24)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All 24 settled as they must" in done.stdout
    assert stack.env()["POSTROAD_API"] in done.stdout


def test_a_task_that_ends_otherwise_is_named(stack: Stack) -> None:
    stack.control_dns(**{"good.test": "nxdomain"})
    stack.control_mail(rules=[{"rcpt": "bea*", "fault": "drop-after"}])
    try:
        # No cache has the domains of these two yet.
        stack.stop("validator-1")
        stack.start("validator-1")
        done = _demo(stack, 2)
    finally:
        stack.control_dns()
        stack.control_mail()
    assert done.returncode == 2  # make exits with 2 when the demo exits with 1
    assert "failed no_such_domain, not completed" in done.stderr
    assert "taken 0 times, not 1" in done.stderr
    assert "taken 2 times, not 1" in done.stderr
