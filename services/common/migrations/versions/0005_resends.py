"""The number of doubts of a mail in its epoch, which limits its resends.

A version before this migration leaves the column out, and so counts nothing.
"""

from alembic import op
from sqlalchemy import inspect

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column unless it exists: an interrupted migration runs again."""
    there = {column["name"] for column in inspect(op.get_bind()).get_columns("deliveries")}
    if "doubts" not in there:
        op.execute("ALTER TABLE deliveries ADD COLUMN doubts INTEGER NOT NULL DEFAULT 0")
