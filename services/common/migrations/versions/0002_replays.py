"""The positions of each replay, so that an interrupted one continues."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table if it is not there yet."""
    op.execute("""
CREATE TABLE IF NOT EXISTS replays (
    id VARCHAR(32) NOT NULL,
    topic VARCHAR(249) NOT NULL,
    arguments JSON NOT NULL,
    epoch BIGINT UNSIGNED NOT NULL,
    positions JSON NOT NULL,
    counts JSON NOT NULL,
    started_at DATETIME(6) NOT NULL,
    updated_at DATETIME(6) NOT NULL,
    finished_at DATETIME(6),
    PRIMARY KEY (id)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin
""")
