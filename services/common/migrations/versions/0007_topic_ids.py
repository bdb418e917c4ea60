"""The ids of the topics, so that `postroad rebuild` recognises a topic that was created again."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table unless it exists."""
    op.execute(
        """
        CREATE TABLE IF NOT EXISTS topic_ids (
            topic VARCHAR(249) NOT NULL,
            id BINARY(16) NOT NULL,
            seen_at DATETIME(6) NOT NULL,
            PRIMARY KEY (topic, id)
        ) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin
        """
    )
