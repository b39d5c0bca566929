"""Handle Ctrl-C and SIGTERM: cancel the job, and wait for its outcome.

To drop the call would cancel the job too, but its outcome would be unknown: it may have been done a
moment before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import types
from collections.abc import Callable
from typing import Final, Self

from convertd_client import errors

INTERRUPTED: Final = 128 + signal.SIGINT

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

PATIENCE_S: Final = 5.0
"""How long a cancelled job may take to end. It takes milliseconds, unless a disk hangs."""


class Stopping:
    """Cancels a job at the first signal, and stops waiting for it at the second.

    After PATIENCE_S, or at a second signal, KeyboardInterrupt is raised in the main thread.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.signal: int | None = None
        self._cancel = cancel
        self._ended = threading.Event()
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def status(self) -> int:
        """The exit status that shells expect of a program ended by this signal."""
        return 128 + (self.signal or signal.SIGINT)

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # In a thread: the signal may have interrupted gRPC, which must not be re-entered.
        threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        # An error means that the job or the daemon has ended, which is the aim.
        with contextlib.suppress(errors.ConvertError):
            self._cancel()
        if not self._ended.wait(PATIENCE_S):
            os.kill(os.getpid(), signal.SIGINT)
