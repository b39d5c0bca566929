"""The queue: whose turn it is, and that it comes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import refusals
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from convertd_core import conditions
from convertd_daemon.broker import queue

WIDE = 1000
uids = st.integers(1, 4)


@dataclass(slots=True, eq=False)
class Item:
    """Something that a user waits for."""

    uid: int
    position: int = 0
    sent_position: int = 0


def bounds(slots: int, slots_per_user: int, waiting: int, waiting_per_user: int) -> queue.Bounds:
    """Those of a queue."""
    return queue.Bounds(
        slots=slots,
        slots_per_user=slots_per_user,
        waiting=waiting,
        waiting_per_user=waiting_per_user,
    )


def lane(slots: int = WIDE, per_user: int = WIDE, waiting: int = WIDE) -> queue.JobQueue[Item]:
    """A lane with these bounds."""
    return queue.JobQueue(bounds(slots, per_user, waiting, waiting))


def joined(a_lane: queue.JobQueue[Item], *uids: int) -> list[Item]:
    """An item of each of these users, in the queue."""
    items = [Item(uid) for uid in uids]
    for item in items:
        a_lane.join(item)
    return items


class Lane(RuleBasedStateMachine):
    """Users who come, are served, leave and finish, in every order."""

    PLACES = 3
    PER_USER = 2
    WAITING = 8
    WAITING_PER_USER = 4

    def __init__(self) -> None:
        super().__init__()
        self.queue: queue.JobQueue[Item] = queue.JobQueue(
            bounds(self.PLACES, self.PER_USER, self.WAITING, self.WAITING_PER_USER)
        )
        self.waiting: list[Item] = []
        self.running: list[Item] = []
        # Who was served since a user's turn began, by that user.
        self.served_meanwhile: dict[int, Counter[int]] = {}

    def waiting_of(self, uid: int) -> list[Item]:
        """What a user waits for, in the order in which it came."""
        return [item for item in self.waiting if item.uid == uid]

    def has_place(self, uid: int) -> bool:
        """Whether a user may have one more place."""
        return sum(item.uid == uid for item in self.running) < self.PER_USER

    @rule(uid=uids)
    def join(self, uid: int) -> None:
        """A request comes: it is taken exactly as long as there is room."""
        item = Item(uid)
        room = len(self.waiting) < self.WAITING
        own_room = len(self.waiting_of(uid)) < self.WAITING_PER_USER
        if room and own_room:
            self.queue.join(item)
            self.waiting.append(item)
            self.served_meanwhile.setdefault(uid, Counter())
        else:
            assert refusals.reason_of(lambda: self.queue.join(item)) == "QUEUE_FULL"

    @rule()
    def serve(self) -> None:
        """A place is given: to whom it is due, if there is one and somebody for it."""
        item = self.queue.next()
        due = [uid for uid in self.served_meanwhile if self.has_place(uid)]
        if item is None:
            assert not due or len(self.running) >= self.PLACES
            return
        assert len(self.running) < self.PLACES
        assert item is self.waiting_of(item.uid)[0]
        assert item.uid in due
        for uid in due:
            self.served_meanwhile[uid][item.uid] += 1
        # In nobody's turn is anybody else served twice: whoever is served goes to the end.
        assert all(self.served_meanwhile[uid][item.uid] == 1 for uid in due)
        self.waiting.remove(item)
        self.running.append(item)
        self.begin_turn(item.uid)

    def begin_turn(self, uid: int) -> None:
        """A user was served, or no longer waits."""
        self.served_meanwhile.pop(uid, None)
        if self.waiting_of(uid):
            self.served_meanwhile[uid] = Counter()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """A job ends, and its place is free."""
        item = data.draw(st.sampled_from(self.running))
        self.running.remove(item)
        self.queue.done(item)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Somebody gives up; the others keep their turns."""
        item = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(item)
        assert self.queue.leave(item)
        assert not self.queue.leave(item)
        if not self.waiting_of(item.uid):
            self.begin_turn(item.uid)

    @invariant()
    def counts_agree(self) -> None:
        """The lane knows how many wait and how many run."""
        assert (len(self.queue), self.queue.running) == (len(self.waiting), len(self.running))
        assert Counter(self.queue.in_order()) == Counter(self.waiting)


def test_queued_user_waits_for_at_most_one_job_of_each_other_user() -> None:
    """Whatever happens, a user's turn comes once a round, and no place is free for no reason."""
    run_state_machine_as_test(Lane, settings=settings(max_examples=50, stateful_step_count=40))


@given(st.lists(uids, max_size=20))
def test_queue_positions_match_the_order_of_service(asked: list[int]) -> None:
    """What `in_order` says is what happens when places become free one after the other."""
    a_lane = lane()
    joined(a_lane, *asked)
    expected = list(a_lane.in_order())
    assert [a_lane.next() for _ in asked] == expected
    assert a_lane.next() is None


def test_user_with_many_requests_delays_only_itself() -> None:
    """One request behind a hundred of somebody else's is the second to be served."""
    a_lane = lane()
    first, *_ = joined(a_lane, *[1] * 100)
    (other,) = joined(a_lane, 2)
    assert [a_lane.next(), a_lane.next()] == [first, other]


def test_user_at_its_slot_limit_is_skipped_and_keeps_its_turn() -> None:
    """The next free place is for somebody else; the one after it for him again."""
    a_lane = lane(slots=2, per_user=1)
    one, two, other, third = joined(a_lane, 1, 1, 2, 3)
    assert [a_lane.next(), a_lane.next(), a_lane.next()] == [one, other, None]
    a_lane.done(one)
    a_lane.done(other)
    assert [a_lane.next(), a_lane.next()] == [third, two]


def test_reloaded_limits_apply_to_queued_jobs() -> None:
    """Nobody is thrown out; nobody more gets in."""
    a_lane = lane(slots=1)
    joined(a_lane, 1, 1, 2)
    assert a_lane.next() is not None
    assert a_lane.next() is None
    a_lane.bounds = bounds(3, 3, 2, 2)
    with pytest.raises(conditions.QueueFull, match="2 requests wait, 2 are allowed for the daemon"):
        a_lane.join(Item(2))
    assert a_lane.next() is not None
    assert a_lane.next() is not None
    assert len(a_lane) == 0


def test_refusal_over_the_queue_limit_of_a_user_names_that_limit() -> None:
    """Not of how many others wait."""
    a_lane: queue.JobQueue[Item] = queue.JobQueue(bounds(1, 1, 9, 2))
    joined(a_lane, 1, 2, 2)
    with pytest.raises(conditions.QueueFull, match="2 requests wait, 2 are allowed for uid 2"):
        a_lane.join(Item(2))


def test_removing_a_job_that_is_not_queued_changes_nothing() -> None:
    """False, and nothing changes."""
    a_lane = lane()
    joined(a_lane, 1)
    assert not a_lane.leave(Item(1))
    assert not a_lane.leave(Item(2))
    assert len(a_lane) == 1
