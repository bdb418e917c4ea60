"""Those whom one catch-up serves: each from its own positions on, though it reads from the earliest. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from services.api.watch import tokens
from services.api.watch.changes import Change, Place
from services.api.watch.watchers import Index, Told, Watcher
from services.common.fold import TaskRow

__all__ = ["Member", "Members", "Sure"]


class Sure(NamedTuple):
    """Positions before which everything was told, also as a token has them."""

    positions: Mapping[Place, int]
    text: str

    @classmethod
    def of(cls, positions: Mapping[Place, int]) -> Sure:
        """Return these positions, as they are now, with their text."""
        return cls(dict(positions), tokens.written(positions))


class Member:
    """A watcher that has heard of everything before `positions`; a place not among them begins at 0."""

    def __init__(self, watcher: Watcher, positions: Mapping[Place, int]) -> None:
        self.watcher, self.positions = watcher, positions
        self._written: tuple[Sure, str] | None = None
        self._ahead = True

    def at(self, place: Place) -> int:
        """Return where it goes on."""
        return self.positions.get(place, 0)

    def own(self, told: Told, sure: Sure) -> Told:
        """Return the message with the member's own token: never one that leads back before where it began."""
        if self._written is None or self._written[0] is not sure:
            text = sure.text
            if self._ahead:
                later = {p: max(at, self.at(p)) for p, at in {**self.positions, **sure.positions}.items()}
                self._ahead = later != sure.positions
                text = tokens.written(later)
            self._written = sure, text
        return told._replace(positions=self._written[1])

    def lost(
        self, starts: Mapping[Place, int], ends: Mapping[Place, int], unknown: Collection[Place]
    ) -> bool:
        """Whether records that it has not heard of are gone, or its positions are not these topics'."""
        return (
            any(self.at(place) < start for place, start in starts.items())
            or any(self.at(place) > end for place, end in ends.items())
            or not self.positions.keys().isdisjoint(unknown)
        )


class Members:
    """Several, and who of them is to hear of a change."""

    def __init__(self, members: Iterable[Member]) -> None:
        self._by_watcher = {member.watcher: member for member in members}
        self._index = Index()
        for watcher in self._by_watcher:
            self._index.add(watcher)
        wanted = {watcher.wanted.task for watcher in self._by_watcher}
        self._tasks = None if None in wanted else wanted

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._by_watcher.values()))

    def remove(self, member: Member) -> None:
        """Forget one."""
        self._index.remove(member.watcher)
        self._by_watcher.pop(member.watcher, None)

    def earliest(self) -> dict[Place, int]:
        """Return from where to read, so that nobody misses anything."""
        members = list(self._by_watcher.values())
        return {
            place: min(m.at(place) for m in members) for place in {p for m in members for p in m.positions}
        }

    def concerns(self, task: bytes | None) -> bool:
        """Whether anybody may want a change of this task."""
        return self._tasks is None or task in self._tasks

    def find(self, change: Change, row: TaskRow) -> list[Member]:
        """Return who wants a change, after which its task stands like this, and has not heard of it."""
        found = [self._by_watcher[watcher] for watcher in self._index.find(row)]
        return [member for member in found if change.offset >= member.at(change.place)]
