"""Start a gRPC call so that no signal handler can interrupt the start.

If an exception interrupts grpcio between making a call and starting the thread that waits for its
end, closing the channel waits for ever. Ctrl-C, or any signal whose handler raises, sometimes does
that. Python runs handlers in the main thread, so a call of the main thread is started in another.
"""

from __future__ import annotations

import _thread
import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
Call = TypeVar("Call", bound=grpc.RpcContext)


@contextlib.contextmanager
def begun(make: Callable[[], Call]) -> Iterator[Call]:
    """Start a call with `make` for the length of the block, and cancel it at the end.

    Raises:
        ValueError: the channel is closed.
    """
    beginning = _Beginning(make)
    try:
        if threading.current_thread() is threading.main_thread():
            thread(beginning.run)
        else:
            beginning.run()
        yield beginning.call()
    finally:
        beginning.abandon()


def thread(work: Callable[P, None], *arguments: P.args, **options: P.kwargs) -> None:
    """Start a thread that is never joined, safely even if a signal handler raises meanwhile.

    Not with threading.Thread, whose start() waits, in Python, until the thread runs: a handler that
    raises there leaves a lock in a wrong state.
    """
    _thread.start_new_thread(work, arguments, options)


class _Beginning(Generic[Call]):
    """A call that one thread makes, and that another waits for or abandons."""

    def __init__(self, make: Callable[[], Call]) -> None:
        self._make = make
        self._made: Call | None = None
        self._is_abandoned = False
        # An error, or None: not the call, which is an exception itself in gRPC.
        self._ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Make the call."""
        try:
            self._made = self._make()
        except Exception as error:  # noqa: BLE001 - it is raised where the call is awaited
            self._ended.put(error)
            return
        self._ended.put(None)
        if self._is_abandoned:
            self._made.cancel()

    def call(self) -> Call:
        """Wait until the call is made, and return it."""
        error = self._ended.get()
        if self._made is None:
            raise error or AssertionError
        return self._made

    def abandon(self) -> None:
        """Cancel the call, now or as soon as it is made."""
        self._is_abandoned = True
        if self._made is not None:
            self._made.cancel()
