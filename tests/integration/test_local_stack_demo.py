"""`make demo` succeeds when every task ends as it must, and only then."""

import os
import subprocess
from pathlib import Path

from deploy.local.demo_cases import CASES
from tests import forked
from tests.stack import Stack

ROOT = Path(__file__).resolve().parents[2]


def _environment(stack: Stack, count: int) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("POSTROAD_", "EMAIL_"))}
    return {**clean, "POSTROAD_LOCAL_DIR": str(stack.directory), "DEMO_TASKS": str(count)}


def test_every_case_ends_as_it_must(stack: Stack) -> None:
    done = subprocess.run(
        # `make test` has run the setup already.
        ["make", "-o", "setup", "demo"],
        env=_environment(stack, len(CASES)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"All {len(CASES)} settled as they must" in done.stdout
    assert stack.env()["POSTROAD_API"] in done.stdout


def test_a_task_that_ends_otherwise_is_named(stack: Stack) -> None:
    stack.control_dns(**{"good.test": "nxdomain"})
    stack.control_mail(rules=[{"rcpt": "bea*", "fault": "drop-after"}])
    try:
        # No cache has the domains of these two yet.
        stack.stop("validator-1")
        stack.start("validator-1")
        code, _, errors = forked.run("deploy.local.demo", [], _environment(stack, 2))
    finally:
        stack.control_dns()
        stack.control_mail()
    assert code == 1
    assert "failed no_such_domain, not completed" in errors
    assert "taken 0 times, not 1" in errors
    assert "taken 2 times, not 1" in errors
