"""Which tasks a replay is about. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from services.cli.replay.standing import Standing

__all__ = ["Selection"]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is asked for. Values of one kind are alternatives; all kinds and all labels must fit.

    Recipients and domains have the form that tasks have, in lower case: a local part is compared without
    regard to case.
    """

    status: frozenset[str] = frozenset()
    reason: frozenset[str] = frozenset()
    recipient: frozenset[str] = frozenset()
    domain: frozenset[str] = frozenset()
    ids: frozenset[bytes] = frozenset()
    labels: tuple[tuple[str, str], ...] = ()

    def takes(self, id_: bytes, task: Standing) -> bool:
        """Whether a task that stands so is meant."""
        return (
            (not self.ids or id_ in self.ids)
            and (not self.status or task.status in self.status)
            and (not self.reason or task.reason in self.reason)
            and (not self.recipient or task.recipient.lower() in self.recipient)
            and (not self.domain or task.domain.lower() in self.domain)
            and all(task.labels.get(key) == value for key, value in self.labels)
        )
