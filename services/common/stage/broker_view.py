"""What the broker says of a consumer group, asked in a process of its own (describe_group.py says why)."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import structlog

from services.common.config import Settings
from services.common.stage.clients import plain_config
from services.common.stage.ledger import Partition
from services.common.topics import Names

__all__ = ["BrokerView"]

log = structlog.get_logger(__name__)

_TIMEOUT = 5.0
# It starts, connects, asks and ends.
_PATIENCE = 15.0


class BrokerView:
    """A `View` (membership.py) of one stage's group. Nothing that goes wrong here is raised: there is no
    answer then."""

    def __init__(self, settings: Settings, stage: str) -> None:
        self._settings = settings
        self._group = Names(settings.topic_prefix).group(stage)
        self._asking: subprocess.Popen[str] | None = None
        self._until = 0.0

    def ask(self, member: str) -> None:
        """Ask what this member owns; a question that is still open goes on. Does not wait for the answer."""
        if self._asking is not None:
            return
        question = {
            "config": plain_config(self._settings, self._settings.replica_name),
            "group": self._group,
            "member": member,
            "timeout": _TIMEOUT,
        }
        try:
            asking = subprocess.Popen(
                [sys.executable, "-m", "services.common.stage.describe_group"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._asking, self._until = asking, time.monotonic() + _PATIENCE
            assert asking.stdin is not None
            with asking.stdin:
                json.dump(question, asking.stdin)
        except OSError as error:
            log.warning("the broker cannot be asked for this member's partitions", error=str(error))

    def answer(self) -> frozenset[Partition] | None:
        """Return what it owns, once; None while there is no answer, or where the member is not known."""
        asking = self._asking
        if asking is None:
            return None
        if asking.poll() is None:
            if time.monotonic() > self._until:
                asking.kill()
            return None
        self._asking = None
        assert asking.stdout is not None
        with asking.stdout:
            said = asking.stdout.read()
        if asking.returncode or not said:
            return None
        owned = json.loads(said)
        return None if owned is None else frozenset((topic, n) for topic, all_ in owned.items() for n in all_)
