"""The first tables. Plain DDL: each table takes one atomic statement that may run again."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_OPTIONS = "ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"

_TASKS = """
CREATE TABLE IF NOT EXISTS tasks (
    id BINARY(16) NOT NULL,
    tenant VARCHAR(64),
    idempotency_key VARBINARY(255),
    request_hash BINARY(32),
    recipient VARCHAR(320),
    domain VARCHAR(255),
    subject VARCHAR(998),
    labels JSON,
    created_at DATETIME(6),
    status ENUM('pending', 'processing', 'completed', 'failed', 'uncertain', 'cancelled') NOT NULL,
    version BIGINT UNSIGNED NOT NULL,
    epoch BIGINT UNSIGNED NOT NULL,
    attempts INTEGER NOT NULL,
    next_attempt_at DATETIME(6),
    reason VARCHAR(64) NOT NULL,
    reply VARCHAR(1024) NOT NULL,
    message_id VARCHAR(255) NOT NULL,
    updated_at DATETIME(6) NOT NULL,
    PRIMARY KEY (id),
    UNIQUE KEY tasks_by_key (tenant, idempotency_key),
    KEY tasks_by_status (status, id),
    KEY tasks_by_recipient (recipient, id),
    KEY tasks_by_domain (domain, id)
)
"""

_TASK_BODIES = """
CREATE TABLE IF NOT EXISTS task_bodies (
    task_id BINARY(16) NOT NULL,
    body LONGTEXT,
    html LONGTEXT,
    headers JSON,
    PRIMARY KEY (task_id)
)
"""

_TASK_EVENTS = """
CREATE TABLE IF NOT EXISTS task_events (
    task_id BINARY(16) NOT NULL,
    event_id VARCHAR(96) NOT NULL,
    at DATETIME(6) NOT NULL,
    stage VARCHAR(16) NOT NULL,
    kind VARCHAR(16) NOT NULL,
    attempt INTEGER NOT NULL,
    relay VARCHAR(255) NOT NULL,
    reply VARCHAR(1024) NOT NULL,
    detail VARCHAR(1024) NOT NULL,
    PRIMARY KEY (task_id, event_id)
)
"""

_OUTBOX = """
CREATE TABLE IF NOT EXISTS outbox (
    task_id BINARY(16) NOT NULL,
    kind VARCHAR(16) NOT NULL,
    epoch BIGINT UNSIGNED NOT NULL,
    available_at DATETIME(6) NOT NULL,
    PRIMARY KEY (task_id, kind, epoch),
    KEY outbox_by_time (available_at)
)
"""

_DELIVERIES = """
CREATE TABLE IF NOT EXISTS deliveries (
    task_id BINARY(16) NOT NULL,
    state ENUM('sending', 'released', 'deferred', 'failed', 'sent', 'uncertain', 'cancelled') NOT NULL,
    epoch BIGINT UNSIGNED NOT NULL,
    attempt INTEGER NOT NULL,
    takeovers INTEGER NOT NULL,
    owner BINARY(16) NOT NULL,
    lease_until DATETIME(6) NOT NULL,
    settled_at BIGINT NOT NULL,
    next_attempt_at BIGINT NOT NULL,
    reason VARCHAR(64) NOT NULL,
    reply VARCHAR(1024) NOT NULL,
    relay VARCHAR(255) NOT NULL,
    message_id VARCHAR(255) NOT NULL,
    PRIMARY KEY (task_id)
)
"""


def upgrade() -> None:
    """Create the tables that do not exist yet."""
    for table in (_TASKS, _TASK_BODIES, _TASK_EVENTS, _OUTBOX, _DELIVERIES):
        op.execute(table + _OPTIONS)
