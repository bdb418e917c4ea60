"""Run by Alembic; the connection comes from `migrate`."""

from alembic import context

from services.common.database.tables import metadata
from services.common.migrations import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
