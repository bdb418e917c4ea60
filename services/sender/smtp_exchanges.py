"""Which reply answers which commands, where several groups of commands are written at once. Pure."""

from collections import deque
from collections.abc import Callable, Sequence

from services.sender.replies import Reply

__all__ = ["Exchange", "Exchanges", "OnReplies"]

OnReplies = Callable[[list[Reply]], None]


class Exchange:
    """Commands that were or will be written together, and their replies so far."""

    __slots__ = ("on_replies", "replies", "timeout", "wanted")

    def __init__(self, wanted: int, timeout: float, on_replies: OnReplies) -> None:
        self.wanted = wanted
        self.timeout = timeout
        self.on_replies = on_replies
        self.replies: list[Reply] = []

    @property
    def answered(self) -> bool:
        return len(self.replies) == self.wanted


class Exchanges(deque[Exchange]):
    """The exchanges of one connection that are not over, in the order in which they are written."""

    __slots__ = ()

    def take(self, replies: Sequence[Reply]) -> tuple[str | None, Reply | None]:
        """Give the replies to the exchanges in their order.

        Returns:
            Why the connection is over, if one of the replies says so, and the first reply to no command.
        """
        over: str | None = None
        extra: Reply | None = None
        waiting = iter(self)
        exchange = next(waiting, None)
        for reply in replies:
            while exchange is not None and len(exchange.replies) == exchange.wanted:
                exchange = next(waiting, None)
            if reply.closes:
                over = str(reply)
            if exchange is not None:
                exchange.replies.append(reply)
            elif extra is None:
                extra = reply
        return over, extra

    def take_unfinished(self, reply: Reply) -> None:
        """Give the first exchange that waits the last reply of the connection, which has not ended."""
        for exchange in self:
            if not exchange.answered:
                exchange.replies.append(reply)
                return
