"""`python3 -m deploy.local`: the stack without Docker. See `--help` and the README beside this file."""

import importlib.util
import os
import sys

from deploy.local.layout import ROOT

__all__: list[str] = []


def _in_virtual_environment() -> None:
    """Replace this process by one of this clone's .venv when this Python lacks what the stack imports."""
    needed = ("confluent_kafka", "dns", "mysql", "rich", "uvloop")
    if all(importlib.util.find_spec(name) for name in needed):
        return
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists() or os.environ.get("POSTROAD_LOCAL_REEXEC"):
        sys.exit("the stack's Python packages are not installed: run `make setup`")
    os.environ["POSTROAD_LOCAL_REEXEC"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.execv(python, [str(python), "-m", "deploy.local", *sys.argv[1:]])


if __name__ == "__main__":
    _in_virtual_environment()
    from deploy.local.command_line import main

    sys.exit(main())
