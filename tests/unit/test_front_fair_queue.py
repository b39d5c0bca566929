"""Turns: one a round of the loop, the users one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from convertd_daemon.front import fair_queue

DEADLINE_S = 60.0


def run(test: Callable[[fair_queue.FairQueue], Awaitable[None]]) -> None:
    """Run a test in a loop of its own."""

    async def bounded() -> None:
        await asyncio.wait_for(test(fair_queue.FairQueue()), DEADLINE_S)

    asyncio.run(bounded())


def test_fair_queue_alternates_between_users() -> None:
    """Within a user's, first come, first served."""
    took: list[tuple[int, int]] = []

    async def take(one: fair_queue.FairQueue, uid: int, number: int) -> None:
        await one.take(uid)
        took.append((uid, number))

    async def test(one: fair_queue.FairQueue) -> None:
        async with asyncio.TaskGroup() as group:
            for uid, count in ((1, 5), (2, 1), (3, 2)):
                for number in range(count):
                    group.create_task(take(one, uid, number))

    run(test)
    assert took == [(1, 0), (1, 1), (2, 0), (3, 0), (1, 2), (3, 1), (1, 3), (1, 4)]


def test_fair_queue_gives_one_turn_per_loop_round() -> None:
    """So that whatever follows from it is done before the next."""
    rounds: list[int] = []
    now = 0

    async def take(one: fair_queue.FairQueue, uid: int) -> None:
        for _ in range(20):
            await one.take(uid)
            rounds.append(now)

    async def test(one: fair_queue.FairQueue) -> None:
        loop = asyncio.get_running_loop()

        def count() -> None:
            nonlocal now
            now += 1
            loop.call_soon(count)

        count()
        await asyncio.gather(*(take(one, uid) for uid in range(5)))

    run(test)
    assert len(rounds) == 100
    assert len(set(rounds)) == 100


class Caller:
    """Somebody who begins one call after the other."""

    def __init__(self) -> None:
        self.began = 0

    async def call(self, one: fair_queue.FairQueue) -> None:
        """Until it is cancelled."""
        while True:
            await one.take(1)
            one.add(1)
            self.began += 1


async def rounds(count: int) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_calls_are_passed_to_grpc_only_as_fast_as_they_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else they would wait in gRPC, where the order is that of their coming alone."""
    monkeypatch.setattr(fair_queue, "LOST_S", 3600.0)

    async def test(one: fair_queue.FairQueue) -> None:
        caller = Caller()
        calling = asyncio.create_task(caller.call(one))
        await rounds(100)
        assert caller.began == fair_queue.AHEAD
        for number in range(1, 10):
            one.on_call_accepted()
            await rounds(10)
            assert caller.began == fair_queue.AHEAD + number
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)

    run(test)


def test_calls_that_never_start_block_the_fair_queue_only_briefly() -> None:
    """They may have been refused, or taken back."""

    async def test(one: fair_queue.FairQueue) -> None:
        caller = Caller()
        calling = asyncio.create_task(caller.call(one))
        while caller.began < 3 * fair_queue.AHEAD:  # noqa: ASYNC110 - nobody sets an event for it
            await asyncio.sleep(fair_queue.LOST_S)
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)

    run(test)


def test_disconnected_user_is_removed_from_the_fair_queue() -> None:
    """Nor does anybody wait for it."""
    took: list[int] = []

    async def take(one: fair_queue.FairQueue, uid: int) -> None:
        await one.take(uid)
        took.append(uid)

    async def test(one: fair_queue.FairQueue) -> None:
        tasks = [asyncio.create_task(take(one, uid)) for uid in (1, 2, 2, 3, 4)]
        await asyncio.sleep(0)
        for gone in (tasks[1], tasks[3]):
            gone.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await one.take(5)

    run(test)
    assert took == [1, 2, 4]


def test_single_user_does_not_wait_in_the_fair_queue() -> None:
    """The usual case: one caller."""

    async def test(one: fair_queue.FairQueue) -> None:
        taking = one.take(1)
        try:
            taking.send(None)
        except StopIteration:
            return
        raise AssertionError("it waits")

    run(test)
