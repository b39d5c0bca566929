"""Begin a gRPC call where no signal can cut its beginning short.

grpcio must not be left between making a call and starting the thread that waits for its end: then
closing the channel waits for ever. That is where Ctrl-C, or any signal whose handler raises, would
leave it now and then. Python runs handlers in the main thread, so from there a call is begun by
another one.
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
    """Have the call that `make` begins for the length of the block, and cancel it at its end.

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
    """Start a thread that nobody waits for, whatever signal comes meanwhile.

    Not by threading.Thread, whose start() waits, in Python, until the thread runs: a handler that
    raises there leaves a lock as it must not be.
    """
    _thread.start_new_thread(work, arguments, options)


class _Beginning(Generic[Call]):
    """A call that one thread makes and another waits for, or does not want any more."""

    def __init__(self, make: Callable[[], Call]) -> None:
        self._make = make
        self._made: Call | None = None
        self._is_abandoned = False
        # An error, or none: a call of gRPC's is an exception itself.
        self._ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Make it."""
        try:
            self._made = self._make()
        except Exception as error:  # noqa: BLE001 - it is raised where the call is awaited
            self._ended.put(error)
            return
        self._ended.put(None)
        if self._is_abandoned:
            self._made.cancel()

    def call(self) -> Call:
        """Wait until it is made."""
        error = self._ended.get()
        if self._made is None:
            raise error or AssertionError
        return self._made

    def abandon(self) -> None:
        """Cancel it, now or as soon as it is made."""
        self._is_abandoned = True
        if self._made is not None:
            self._made.cancel()
