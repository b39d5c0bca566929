"""Turns: one a round of the loop, the users one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from convertd_daemon.front import turns

DEADLINE_S = 60.0


def run(test: Callable[[turns.Turns], Awaitable[None]]) -> None:
    """Run a test in a loop of its own."""

    async def bounded() -> None:
        await asyncio.wait_for(test(turns.Turns()), DEADLINE_S)

    asyncio.run(bounded())


def test_users_take_turns_however_many_of_one_wait() -> None:
    """Within a user's, first come, first served."""
    took: list[tuple[int, int]] = []

    async def take(one: turns.Turns, uid: int, number: int) -> None:
        await one.take(uid)
        took.append((uid, number))

    async def test(one: turns.Turns) -> None:
        async with asyncio.TaskGroup() as group:
            for uid, count in ((1, 5), (2, 1), (3, 2)):
                for number in range(count):
                    group.create_task(take(one, uid, number))

    run(test)
    assert took == [(1, 0), (1, 1), (2, 0), (3, 0), (1, 2), (3, 1), (1, 3), (1, 4)]


def test_a_round_has_one_turn() -> None:
    """So that whatever follows from it is done before the next."""
    rounds: list[int] = []
    now = 0

    async def take(one: turns.Turns, uid: int) -> None:
        for _ in range(20):
            await one.take(uid)
            rounds.append(now)

    async def test(one: turns.Turns) -> None:
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


def test_who_is_gone_has_no_turn() -> None:
    """Nor does anybody wait for it."""
    took: list[int] = []

    async def take(one: turns.Turns, uid: int) -> None:
        await one.take(uid)
        took.append(uid)

    async def test(one: turns.Turns) -> None:
        tasks = [asyncio.create_task(take(one, uid)) for uid in (1, 2, 2, 3, 4)]
        await asyncio.sleep(0)
        for gone in (tasks[1], tasks[3]):
            gone.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await one.take(5)

    run(test)
    assert took == [1, 2, 4]


def test_nobody_waits_for_a_turn_that_nobody_has() -> None:
    """The usual case: one caller."""

    async def test(one: turns.Turns) -> None:
        taking = one.take(1)
        try:
            taking.send(None)
        except StopIteration:
            return
        raise AssertionError("it waits")

    run(test)
