"""`postroad migrate` and `postroad topics`: what an installation needs before it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.command import DATABASE, KAFKA, CommandContext, Yes, command
from services.cli.errors import FAILED
from services.cli.output import Column, OutputRow
from services.cli.terminal import confirm, say

if TYPE_CHECKING:
    from services.common.config import Settings
    from services.common.kafka.admin import TopicDifferences

__all__ = ["register"]

_AS_THEY_MUST_BE = "The topics are as they must be."
# An empty `deliveries` knows no mail that went out, an empty `tasks` no idempotency key.
_STOPPED = {"deliveries": "senders", "tasks": "apis"}
_COLUMNS = (Column("topic"), Column("state"), Column("detail", min_width=20))


def register(app: typer.Typer, topics: typer.Typer) -> None:
    """Add the commands to the app and to its group `topics`."""

    @command(app, "migrate", uses=(DATABASE,), examples="postroad migrate --env-file .local/stack.env")
    def migrate(context: CommandContext, yes: Yes = False) -> None:
        """Bring the database to this version's tables. Run it before the services of a new version start.

        A database that a later version has migrated serves this one too: nothing is done then.

        It creates tables that somebody dropped, empty. It asks before it creates `deliveries` or `tasks`:
        with an empty one, senders and apis that run may send mails twice.
        """
        from services.common import migrations  # noqa: PLC0415
        from services.common.operations.database_url import database_url  # noqa: PLC0415

        url = database_url(context.settings())
        migrated = migrations.migrate(url)
        created = migrations.missing_tables(url) if migrated else []
        for table, services in _STOPPED.items():
            if table in created:
                say(f"The table {table} is gone. Stop the {services} until it is rebuilt: see Rebuilding.")
                confirm(f"Are all {services} stopped?", yes)
        if created:
            migrations.create_tables(url, created)
        line = "up to date" if migrated else "newer than this version, which goes on with it as it is"

        def show(_: OutputRow) -> None:
            for name in created:
                print(f"created the missing table {name}, empty; see Rebuilding in docs/operations.md")
            print(f"The database is {line}.")

        context.out.one({"migrated": migrated, "created": created}, show)

    @command(
        topics,
        "check",
        uses=(KAFKA,),
        examples="""
            postroad topics check
            POSTROAD_PARTITIONS=24 postroad topics check -o json
        """,
    )
    def check(context: CommandContext) -> None:
        """Compare the topics with what they must be. Changes nothing; exit code 1 where one differs.

        Partitions, replicas and delays that no setting gives are those that the cluster has.
        """
        from services.common.kafka import admin as kafka_admin  # noqa: PLC0415
        from services.common.stages import all_topics  # noqa: PLC0415

        settings = _settings(context)
        rows = _rows(kafka_admin.compare(settings, all_topics(settings)), settings)
        context.out.rows(rows, _COLUMNS, _AS_THEY_MUST_BE)
        if rows:
            raise typer.Exit(FAILED)

    @command(
        topics,
        "apply",
        uses=(KAFKA,),
        examples="""
            postroad topics apply
            POSTROAD_REPLICATION=3 postroad topics apply --yes -o json
            POSTROAD_PARTITIONS=24 postroad topics apply --grow
        """,
    )
    def apply(
        context: CommandContext,
        *,
        grow: Annotated[
            bool, typer.Option("--grow", help="Give topics that have too few partitions the missing ones.")
        ] = False,
        yes: Yes = False,
    ) -> None:
        """Create the topics that are missing, and fail where one that exists is not as it must be.

        It lists what it will do and asks. Partitions, replicas and delays are those of the settings
        (POSTROAD_PARTITIONS, POSTROAD_REPLICATION, POSTROAD_VALIDATOR_DELAYS, POSTROAD_SENDER_DELAYS). Those
        that no setting gives are what the cluster has, or the defaults where it has no topics yet.

        A topic that keeps its records too short a time is made to keep them longer. Of all else that exists
        --grow alone changes anything: Kafka never takes a partition back. docs/operations.md says what to
        heed.
        """
        from services.common.kafka import admin as kafka_admin  # noqa: PLC0415
        from services.common.stages import all_topics  # noqa: PLC0415

        settings = _settings(context)
        found = kafka_admin.compare(settings, all_topics(settings))
        small = found.small if grow else {}
        todo = [
            *(f"create {topic.name}, {topic.partitions} partitions" for topic in found.missing),
            *(f"keep longer {name}" for name in found.short),
            *(
                f"grow {name} from {n} to {settings.partitions} partitions, for good"
                for name, n in small.items()
            ),
        ]
        if todo and not yes:
            for line in todo:
                say(line)
            confirm(f"Change {len(todo)} topics?", yes)
        kafka_admin.grow(settings, small)
        applied = kafka_admin.apply(
            settings, all_topics(settings), replace(found, small={} if grow else found.small)
        )
        rows = [{"topic": name, "state": "grown"} for name in small]
        rows += [{"topic": name, "state": "created"} for name in applied.created]
        rows += [{"topic": name, "state": "kept longer"} for name in applied.raised]
        rows += map(_differs, applied.differences)
        if not context.out.is_table:
            context.out.rows(rows, ())
        for row in rows:
            if row["state"] == "differs":
                say(f"differs {row['topic']}: {row['detail']}")
            elif context.out.is_table:
                print(row["state"], row["topic"])
        if applied.differences:
            raise typer.Exit(FAILED)
        if context.out.is_table:
            print(_AS_THEY_MUST_BE)


def _settings(context: CommandContext) -> Settings:
    from services.common.operations.installation import with_cluster_settings  # noqa: PLC0415

    return with_cluster_settings(context.settings())


def _rows(found: TopicDifferences, settings: Settings) -> list[dict[str, str]]:
    """Return a row for each way in which a topic is not as it must be."""
    rows = [{"topic": topic.name, "state": "missing", "detail": ""} for topic in found.missing]
    for name, has in found.short.items():
        detail = f"retention.ms is {has}, wanted {found.retention[name]}"
        rows.append({"topic": name, "state": "kept too short", "detail": detail})
    for name, number in found.small.items():
        detail = f"{number} partitions, wanted {settings.partitions}"
        rows.append({"topic": name, "state": "too small", "detail": detail})
    rows += map(_differs, found.differences)
    return rows


def _differs(difference: str) -> dict[str, str]:
    name, _, detail = difference.partition(": ")
    return {"topic": name, "state": "differs", "detail": detail}
