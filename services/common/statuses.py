"""The statuses of a task: how it stands."""

from __future__ import annotations

__all__ = ["ENDED_WITHOUT_MAIL", "FINAL_STATUSES", "STATUSES"]

ENDED_WITHOUT_MAIL = ("failed", "uncertain", "cancelled")
"""The statuses of tasks whose mails were not certainly sent. Deliveries have states of the same names."""
FINAL_STATUSES = ("completed", *ENDED_WITHOUT_MAIL)
"""The statuses that a task keeps until a client or an operator changes them."""
STATUSES = ("pending", "processing", *FINAL_STATUSES)
"""All statuses. The column `tasks.status` has them in this order."""
