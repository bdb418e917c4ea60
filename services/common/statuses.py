"""The statuses of a task: how it stands."""

from __future__ import annotations

__all__ = ["FINAL_STATUSES", "NOT_COMPLETED", "STATUSES"]

NOT_COMPLETED = ("failed", "uncertain", "cancelled")
"""The final statuses but `completed`: the mail is not known to be sent.

Deliveries have states of the same names."""
FINAL_STATUSES = ("completed", *NOT_COMPLETED)
"""The statuses that a task keeps until a client or an operator changes them."""
STATUSES = ("pending", "processing", *FINAL_STATUSES)
"""All statuses. The column `tasks.status` has them in this order."""
