"""The mails whose envelopes follow another mail's message, and when they stop waiting for its reply."""

import asyncio
from collections.abc import Callable, Iterator

from services.sender.smtp_mail import OutgoingMail

__all__ = ["ChainedMails"]

_INTERVAL = 0.25


class ChainedMails:
    """The chained mails of a pool, oldest first. Belongs to one event loop.

    A chained mail must not wait for a slow reply while others move on. ``on_stuck`` gets the mails that wait
    for two to three intervals of 250 ms. It gets them only if another mail began in the last interval, or if
    ``is_free()``: a session is idle or might be opened. So a pause of the whole relay makes no mail stuck.
    """

    def __init__(self, is_free: Callable[[], bool], on_stuck: Callable[[list[OutgoingMail]], None]) -> None:
        self._is_free = is_free
        self._on_stuck = on_stuck
        self._since: dict[OutgoingMail, int] = {}
        self._interval = 0
        self._timer: asyncio.TimerHandle | None = None
        self._begun_before = 0
        self.begun = 0
        """How many mails have begun in all; the owner counts them."""

    def __iter__(self) -> Iterator[OutgoingMail]:
        return iter(self._since)

    def add(self, mail: OutgoingMail) -> None:
        self._since[mail] = self._interval
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._end_interval)

    def discard(self, mail: OutgoingMail) -> None:
        """Forget a mail that waits for no other mail's reply anymore, if it is known."""
        self._since.pop(mail, None)

    def close(self) -> None:
        """Stop looking for stuck mails."""
        if self._timer is not None:
            self._timer.cancel()

    def _end_interval(self) -> None:
        self._interval += 1
        moved, self._begun_before = self.begun != self._begun_before, self.begun
        stuck = [mail for mail, since in self._since.items() if self._interval - since > 2]
        if stuck and (moved or self._is_free()):
            self._on_stuck(stuck)
        self._timer = None
        if self._since:
            self._timer = asyncio.get_running_loop().call_later(_INTERVAL, self._end_interval)
