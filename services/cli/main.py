"""The `postroad` command. Results go to stdout, the rest to stderr.

Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 denied, 5 unavailable.
"""

from __future__ import annotations

import sys

import typer
from pydantic import ValidationError

from services.common.config import Settings, settings

__all__ = ["app", "main"]

FAILED, USAGE, UNAVAILABLE = 1, 2, 5

app = typer.Typer(
    name="postroad", no_args_is_help=True, add_completion=False, help="Run Postroad's installation."
)
topics = typer.Typer(no_args_is_help=True, help="The Kafka topics.")
app.add_typer(topics, name="topics")


def _settings() -> Settings:
    try:
        return settings()
    except ValidationError as error:
        for problem in error.errors():
            print(f"{problem['loc'][0]}: {problem['msg']}", file=sys.stderr)
        raise typer.Exit(USAGE) from None


def _fail(message: object, code: int = FAILED) -> typer.Exit:
    print(f"postroad: {message}", file=sys.stderr)
    return typer.Exit(code)


@app.command()
def migrate() -> None:
    """Bring the database (POSTROAD_DATABASE_URL) to this version's tables."""
    # Imported here, as below: Alembic or Kafka's client would double the start of every other command.
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    from services.common.database import transient  # noqa: PLC0415
    from services.common.migrations import migrate as run  # noqa: PLC0415

    try:
        run(_settings().database_url)
    except DBAPIError as error:
        raise _fail(error.orig, UNAVAILABLE if transient(error) else FAILED) from None
    except TimeoutError as error:
        raise _fail(error, UNAVAILABLE) from None
    print("The database is up to date.")


@topics.command("apply")
def topics_apply() -> None:
    """Create the topics that are missing, and fail where one that exists is not as it must be."""
    from confluent_kafka import KafkaException  # noqa: PLC0415

    from services.common import kafka_admin  # noqa: PLC0415

    try:
        applied = kafka_admin.apply(_settings())
    except KafkaException as error:
        local = error.args[0].code() < 0  # the client's own: no connection, timed out
        raise _fail(error.args[0].str(), UNAVAILABLE if local else FAILED) from None
    for name in applied.created:
        print(f"created {name}")
    for difference in applied.differences:
        print(f"differs {difference}", file=sys.stderr)
    if applied.differences:
        raise typer.Exit(FAILED)
    print("The topics are as they must be.")


def main() -> None:
    """Run the command that the process's arguments name, and exit."""
    app()
