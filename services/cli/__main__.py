"""`python -m services.cli` is the `postroad` command, and so is `main` here.

Its modules are loaded inside, so that Ctrl-C while they are is no traceback either.
"""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command that the process's arguments name, and exit."""
    try:
        from services.cli.main import main as run  # noqa: PLC0415
    except KeyboardInterrupt:
        print("postroad: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
