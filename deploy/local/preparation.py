"""Gives the services of a stack what they need of its servers: the database's tables, and the topics.

It does what `postroad migrate` and `postroad topics apply` do unasked, without a process for each: to import
the libraries twice takes longer than the work. Everything blocks, and raises StackError.
"""

import os
from collections.abc import Callable, Mapping

from deploy.local.launcher import StackError
from services.cli.errors import explain
from services.cli.settings import effective_variables, make_settings
from services.common import migrations
from services.common.config import Settings
from services.common.kafka import admin
from services.common.operations.database_url import database_url
from services.common.operations.installation import with_cluster_settings
from services.common.stages import all_topics

__all__ = ["apply_topics", "migrate"]


def migrate(variables: Mapping[str, str]) -> None:
    """Bring the database that these settings name to this version's tables."""
    _run("migrate", variables, _migrate)


def apply_topics(variables: Mapping[str, str]) -> None:
    """Create the topics that these settings want and the cluster lacks."""
    _run("topics apply", variables, _apply)


def _migrate(settings: Settings) -> None:
    url = database_url(settings)
    if migrations.migrate(url) and (missing := migrations.missing_tables(url)):
        raise StackError(f"somebody dropped {', '.join(missing)}: see Rebuilding in docs/operations.md")


def _apply(settings: Settings) -> None:
    settings = with_cluster_settings(settings)
    if differences := admin.apply(settings, all_topics(settings)).differences:
        raise StackError("\n".join(("the topics differ from what they must be:", *differences)))


def _run(command: str, variables: Mapping[str, str], work: Callable[[Settings], object]) -> None:
    settings = None
    try:
        # The stack knows all settings: the user's config file adds none.
        settings = make_settings(effective_variables({}, {**variables, "POSTROAD_CONFIG": os.devnull}))
        work(settings)
    except Exception as error:
        if (failure := explain(error, variables.get("POSTROAD_KAFKA_BOOTSTRAP", ""))) is None:
            raise
        # A wrong setting is the user's own, and no command has run: its name comes first.
        raise StackError(f"`postroad {command}` failed: {failure}" if settings else str(failure)) from error
