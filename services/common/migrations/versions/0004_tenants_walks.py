"""Indexes of recipients and domains within a tenant, so that a tenant with few tasks finds them at once.

Each index replaces one of the same name, so that a version before this migration still finds it.
"""

from alembic import op
from sqlalchemy import inspect

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Replace the old indexes, one a statement, since each may take minutes."""
    there = {index["name"]: index["column_names"] for index in inspect(op.get_bind()).get_indexes("tasks")}
    for column in ("recipient", "domain"):
        name = f"tasks_by_{column}"
        if there[name][0] != "tenant":
            op.execute(f"ALTER TABLE tasks DROP KEY {name}, ADD KEY {name} (tenant, {column}, id)")
