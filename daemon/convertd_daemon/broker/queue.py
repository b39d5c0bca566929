"""The queue of jobs: round robin over users, so that a user who asks often delays no other."""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from convertd_core import conditions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from convertd_core import values
    from convertd_daemon.loop import Loop, Timer

AGAIN_S: Final = 0.2
"""How long no position is sent again. Each start changes all positions, and each message takes
processor time that conversions need."""


class Waiting(Protocol):
    """What may wait: its position, and the one that its caller was last sent; 0 is none."""

    position: int
    sent_position: int

    @property
    def uid(self) -> int:
        """The user it is for."""


T = TypeVar("T", bound=Waiting)

THE_DAEMON: Final = "the daemon"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How many may run, and how many may wait, in all and of one user."""

    slots: int
    slots_per_user: int
    waiting: int
    waiting_per_user: int


def _bounds(slots: int, slots_per_user: int, limits: values.Limits) -> Bounds:
    return Bounds(
        slots=slots,
        slots_per_user=slots_per_user,
        waiting=limits.queue,
        waiting_per_user=limits.queue_per_user,
    )


def conversion_bounds(limits: values.Limits) -> Bounds:
    """Of the queue of conversions."""
    return _bounds(limits.jobs, limits.jobs_per_user, limits)


def inspection_bounds(limits: values.Limits) -> Bounds:
    """Of the queue of inspections."""
    return _bounds(limits.inspections, limits.inspections_per_user, limits)


class JobQueue(Generic[T]):
    """A number of slots, and the queue before them. `bounds` may change at any time.

    A user's turn comes once a round, whatever is queued; within a user it is first come, first
    served. A user who has all the slots that one user may have is passed over, and keeps the turn.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._queues: dict[int, deque[T]] = {}
        self._running: Counter[int] = Counter()

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return self._running.total()

    @property
    def has_free_slot(self) -> bool:
        """Whether another user's item could begin at once."""
        return self.running < self.bounds.slots

    def join(self, item: T) -> None:
        """Put an item at the end of its user's queue.

        Raises:
            conditions.QueueFull: too many wait already, of this user or in all.
        """
        own = len(self._queues.get(item.uid, ()))
        if own >= (limit := self.bounds.waiting_per_user):
            raise conditions.QueueFull(waiting=own, limit=limit, whom=f"uid {item.uid}")
        if len(self) >= (limit := self.bounds.waiting):
            raise conditions.QueueFull(waiting=len(self), limit=limit, whom=THE_DAEMON)
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
        """Give the item whose turn it is a slot, if one is free for it."""
        if not self.has_free_slot:
            return None
        for uid, queue in self._queues.items():
            if self._running[uid] < self.bounds.slots_per_user:
                item = queue.popleft()
                # The user goes to the end of the round.
                del self._queues[uid]
                if queue:
                    self._queues[uid] = queue
                self._running[uid] += 1
                return item
        return None

    def done(self, item: T) -> None:
        """Free the slot of an item that `next` gave."""
        self._running[item.uid] -= 1
        if not self._running[item.uid]:
            del self._running[item.uid]

    def in_order(self) -> Iterator[T]:
        """All that wait, in the order in which they would be served if all slots were free."""
        for turn in itertools.zip_longest(*self._queues.values()):
            yield from (item for item in turn if item is not None)


class Positions(Generic[T]):
    """Numbers those that wait, each queue from 1, and has their callers told.

    Who is new hears it at once, the others now and then. `send` tells one caller, and says False if
    nobody can be told at present; whoever knows when that is over calls `notify` again.
    """

    def __init__(
        self, loop: Loop, queues: Iterable[JobQueue[T]], send: Callable[[T], bool]
    ) -> None:
        self._loop = loop
        self._queues = tuple(queues)
        self._send = send
        self._due = 0.0
        self._timer: Timer | None = None

    def notify(self) -> None:
        """Number those that wait anew, and tell whoever may be told now; the others later."""
        now = time.monotonic()
        is_due = now >= self._due
        moved, held_back = self._moved(), False
        for item in moved:
            if item.sent_position and not is_due:
                held_back = True
            elif self._send(item):
                item.sent_position = item.position
            else:
                return
        if is_due and moved:
            self._due = now + AGAIN_S
        elif held_back and self._timer is None:
            self._timer = self._loop.after(self._due - now, self._again)

    def _moved(self) -> list[T]:
        """Those whose position is another than they were told."""
        moved = []
        for queue in self._queues:
            for position, item in enumerate(queue.in_order(), start=1):
                item.position = position
                if item.sent_position != position:
                    moved.append(item)
        return moved

    def _again(self) -> None:
        self._timer = None
        self.notify()
