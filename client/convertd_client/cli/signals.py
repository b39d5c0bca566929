"""Ctrl-C and SIGTERM: the job is cancelled, and what became of it is waited for.

Dropping the call would cancel the job too, but then nobody could say whether it had been done a
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
    """Cancels a job at the first signal, and gives up waiting at the second.

    Giving up, after PATIENCE_S or at a second signal, is a KeyboardInterrupt where the job is
    waited for.
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
        """With what exit status a shell expects a program to end that was stopped so."""
        return 128 + (self.signal or signal.SIGINT)

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # In a thread: gRPC is not to be called from within whatever the signal interrupted.
        threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        # A job that has just ended, or a daemon that has, is what we wait for.
        with contextlib.suppress(errors.ConvertError):
            self._cancel()
        if not self._ended.wait(PATIENCE_S):
            os.kill(os.getpid(), signal.SIGINT)
