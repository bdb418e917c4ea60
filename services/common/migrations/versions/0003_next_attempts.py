"""The time of each next attempt in the timeline, and an index of the statuses within a tenant.

The column comes last, so the server rewrites no row. The server builds the index before it drops the old one.
"""

from alembic import op
from sqlalchemy import inspect

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column and the index unless they exist."""
    found = inspect(op.get_bind())
    if "next_attempt_at" not in {column["name"] for column in found.get_columns("task_events")}:
        op.execute("ALTER TABLE task_events ADD COLUMN next_attempt_at DATETIME(6)")
    [by_status] = [index for index in found.get_indexes("tasks") if index["name"] == "tasks_by_status"]
    if by_status["column_names"][0] != "tenant":
        op.execute("ALTER TABLE tasks DROP KEY tasks_by_status, ADD KEY tasks_by_status (tenant, status, id)")
