"""Who is next: round robin over users, so that who asks often makes nobody wait but himself."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from convertd_core import conditions

if TYPE_CHECKING:
    from collections.abc import Iterator


class Owned(Protocol):
    """Anything that is somebody's."""

    @property
    def uid(self) -> int:
        """Whose it is."""


T = TypeVar("T", bound=Owned)

THE_DAEMON: Final = "the daemon"


class JobQueue(Generic[T]):
    """A number of places, and the queue before them.

    A user's turn comes once a round, whatever he has queued; within a user it is first come, first
    served. A user who has all the places that one user may have is passed over, and keeps his turn.
    """

    def __init__(self, *, slots: int, slots_per_user: int, waiting: int, per_user: int) -> None:
        self.set_limits(
            slots=slots, slots_per_user=slots_per_user, waiting=waiting, per_user=per_user
        )
        self._queues: dict[int, deque[T]] = {}
        self._running: Counter[int] = Counter()

    def set_limits(self, *, slots: int, slots_per_user: int, waiting: int, per_user: int) -> None:
        """Set the bounds, at the start and when the policy is reloaded."""
        self.slots = slots
        self.slots_per_user = slots_per_user
        self.waiting_limit = waiting
        self.waiting_per_user = per_user

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    @property
    def running(self) -> int:
        """How many places are taken."""
        return self._running.total()

    def join(self, item: T) -> None:
        """Put an item at the end of its user's queue.

        Raises:
            conditions.QueueFull: too many wait already, of this user or in all.
        """
        own = self._queues.get(item.uid, ())
        if len(own) >= self.waiting_per_user:
            raise conditions.QueueFull(
                waiting=len(own), limit=self.waiting_per_user, whom=f"uid {item.uid}"
            )
        if len(self) >= self.waiting_limit:
            raise conditions.QueueFull(waiting=len(self), limit=self.waiting_limit, whom=THE_DAEMON)
        self._queues.setdefault(item.uid, deque()).append(item)

    def leave(self, item: T) -> bool:
        """Take an item out of the queue; False if it does not wait."""
        queue = self._queues.get(item.uid, deque())
        if item not in queue:
            return False
        queue.remove(item)
        if not queue:
            del self._queues[item.uid]
        return True

    def next(self) -> T | None:
        """Give the item whose turn it is a place, if one is free for it."""
        if self.running >= self.slots:
            return None
        for uid, queue in self._queues.items():
            if self._running[uid] < self.slots_per_user:
                item = queue.popleft()
                # The user goes to the end of the round.
                del self._queues[uid]
                if queue:
                    self._queues[uid] = queue
                self._running[uid] += 1
                return item
        return None

    def done(self, item: T) -> None:
        """Free the place of an item that `next` gave."""
        self._running[item.uid] -= 1
        if not self._running[item.uid]:
            del self._running[item.uid]

    def in_order(self) -> Iterator[T]:
        """All that wait, in the order in which they would be served if all places were free."""
        for turn in itertools.zip_longest(*self._queues.values()):
            yield from (item for item in turn if item is not None)
