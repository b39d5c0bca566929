"""The broker's loop: descriptors, timers and signals, one after the other."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator

import pytest
from children import in_child

from convertd_daemon import loop

Pipe = tuple[int, int]


def timers() -> int:
    """How many timers are in memory."""
    gc.collect()
    return sum(isinstance(one, loop.Timer) for one in gc.get_objects())


@pytest.fixture
def a_loop() -> loop.Loop:
    """A loop that ends by itself if a test forgets to."""
    made = loop.Loop()
    made.after(20.0, made.stop)
    return made


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe: its reading end, its writing end."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


class TestDescriptors:
    """epoll(7)."""

    def test_event_handler_is_called_when_a_descriptor_is_ready(
        self, a_loop: loop.Loop, pipe: Pipe
    ) -> None:
        """With what there is."""
        reader, writer = pipe
        seen: list[tuple[int, bytes]] = []

        def read(events: int) -> None:
            seen.append((events, os.read(reader, 10)))
            a_loop.stop()

        a_loop.watch(reader, loop.READ, read)
        os.write(writer, b"x")
        a_loop.run()
        assert seen == [(loop.READ, b"x")]

    def test_changed_event_mask_and_handler_take_effect(
        self, a_loop: loop.Loop, pipe: Pipe
    ) -> None:
        """The last handler and the last events count."""
        _, writer = pipe
        a_loop.watch(writer, 0, lambda _: pytest.fail("the old handler was called"))
        a_loop.watch(writer, loop.WRITE, lambda _: a_loop.stop())
        a_loop.run()

    def test_unregistered_descriptor_gets_no_event(self, a_loop: loop.Loop, pipe: Pipe) -> None:
        """Also twice, and of what was never watched."""
        reader, writer = pipe
        os.write(writer, b"x")
        a_loop.watch(reader, loop.READ, lambda _: pytest.fail("a forgotten handler was called"))
        a_loop.forget(reader)
        a_loop.forget(reader)
        a_loop.forget(writer)
        a_loop.after(0.0, a_loop.stop)
        a_loop.run()

    def test_descriptor_unregistered_by_a_handler_gets_no_event_in_the_same_round(
        self, a_loop: loop.Loop, pipe: Pipe
    ) -> None:
        """Both were ready; the first of them closes the other."""
        reader, writer = pipe
        second = os.dup(reader)
        called: list[int] = []

        def handler_of(own: int, other: int) -> None:
            called.append(own)
            a_loop.forget(other)
            a_loop.stop()

        a_loop.watch(reader, loop.READ, lambda _: handler_of(reader, second))
        a_loop.watch(second, loop.READ, lambda _: handler_of(second, reader))
        os.write(writer, b"x")
        a_loop.run()
        os.close(second)
        assert len(called) == 1

    def test_event_handler_that_raises_ends_the_loop(self, a_loop: loop.Loop, pipe: Pipe) -> None:
        """A bug is not served around."""
        _, writer = pipe

        def fail(_events: int) -> None:
            raise LookupError

        a_loop.watch(writer, loop.WRITE, fail)
        with pytest.raises(LookupError):
            a_loop.run()


class TestTimers:
    """What is due is done, in order, and not before."""

    def test_timers_fire_in_order_of_their_due_time(self, a_loop: loop.Loop) -> None:
        """Not in that in which they were set."""
        called: list[str] = []
        a_loop.after(0.02, a_loop.stop)
        a_loop.after(0.01, lambda: called.append("second"))
        a_loop.after(0.0, lambda: called.append("first"))
        a_loop.run()
        assert called == ["first", "second"]

    def test_timers_do_not_fire_early(self, a_loop: loop.Loop) -> None:
        """By the monotonic clock."""
        began = time.monotonic()
        a_loop.after(0.05, a_loop.stop)
        a_loop.run()
        assert time.monotonic() - began >= 0.05

    def test_cancelled_timers_do_not_fire(self, a_loop: loop.Loop) -> None:
        """And what they would have needed is let go of."""
        timer = a_loop.after(0.0, lambda: pytest.fail("a cancelled timer was called"))
        timer.cancel()
        a_loop.after(0.001, a_loop.stop)
        a_loop.run()
        assert timer.action is None

    def test_thousands_of_cancelled_timers_use_no_memory(self, a_loop: loop.Loop) -> None:
        """Each job has one, due in a day; those that live are kept."""
        called: list[int] = []
        before = timers()
        for number in range(20):
            a_loop.after(0.0, lambda number=number: called.append(number))  # type: ignore[misc]
        for _ in range(10 * loop.MANY_TIMERS):
            a_loop.after(3600.0, a_loop.stop).cancel()
        assert timers() - before < 2 * loop.MANY_TIMERS
        a_loop.after(0.001, a_loop.stop)
        a_loop.run()
        assert sorted(called) == list(range(20))


class TestSignals:
    """From the loop, never in between. In a child: handlers are the whole process's."""

    def test_each_pending_signal_is_handled_once(self) -> None:
        """However often it came before the loop looked."""

        def act() -> list[str]:
            a_loop = loop.Loop()
            heard: list[str] = []
            a_loop.on_signals(
                {
                    signal.SIGUSR1: lambda: heard.append("one"),
                    signal.SIGUSR2: lambda: heard.append("two"),
                }
            )
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            # Nothing happens in between: not here, where a handler would interrupt us.
            before = list(heard)
            a_loop.after(0.05, a_loop.stop)
            a_loop.run()
            return before + sorted(heard)

        assert in_child(act) == ["one", "two"]

    def test_signal_flood_fills_the_wakeup_socket_without_loss(self) -> None:
        """The wakeup socket is full then; that something came is known all the same."""

        def act() -> int:
            a_loop = loop.Loop()
            heard: list[int] = []
            a_loop.on_signals({signal.SIGUSR1: lambda: heard.append(1)})
            for _ in range(20_000):
                os.kill(os.getpid(), signal.SIGUSR1)
            a_loop.after(0.05, a_loop.stop)
            a_loop.run()
            return len(heard)

        assert in_child(act) >= 1
