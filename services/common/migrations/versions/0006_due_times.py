"""The due time of each row of the outbox, since each sweep moves `available_at` ahead.

A version before this migration leaves the column out; its rows count as due at their next try.
"""

from alembic import op
from sqlalchemy import inspect

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column and extend the index to both times, unless that is done."""
    there = {column["name"] for column in inspect(op.get_bind()).get_columns("outbox")}
    if "due_at" not in there:
        op.execute(
            "ALTER TABLE outbox ADD COLUMN due_at DATETIME(6),"
            " DROP KEY outbox_by_time, ADD KEY outbox_by_time (available_at, due_at)"
        )
