"""The outcome that a job reports to the broker: once, on a pipe of its own, before the front's.

The channel to the front belongs to the caller, and closing it ends the job. The audit record must
not depend on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from typing import TYPE_CHECKING, Final

from convertd_core import codec, messages
from convertd_daemon import channel

if TYPE_CHECKING:
    import socket


LONGEST_DETAIL: Final = 2000
"""In characters. An outcome fits into an empty pipe, so that writing it never blocks."""


class OutcomeReporter(channel.Channel):
    """A job's channel that also reports the outcome when the job sends how it ended.

    Owns the socket, and the pipe's writing end.
    """

    def __init__(self, sock: socket.socket, pipe: int) -> None:
        super().__init__(sock)
        self._pipe = pipe
        self._known = messages.JobOutcome(done=False)

    def descriptors(self) -> tuple[int, int]:
        """The socket's and the pipe's."""
        return self.fileno(), self._pipe

    def send(self, message: object, *descriptors: int, wait: bool = True) -> bool:
        """Note what the message tells of the outcome, then send it. See Channel."""
        match message:
            case messages.Planned(plan=plan):
                self._known = dataclasses.replace(
                    self._known,
                    source_format=plan.source_format,
                    source_cache=str(plan.source_cache.mode),
                    dest_cache=str(plan.dest_cache.mode),
                    method=plan.method,
                    virtual_size_bytes=plan.virtual_size_bytes,
                )
            case messages.Inspected(image=image):
                self._known = dataclasses.replace(
                    self._known,
                    source_format=image.format,
                    virtual_size_bytes=image.virtual_size_bytes,
                )
                self.report(done=True)
            case messages.Succeeded(result=result):
                self._known = dataclasses.replace(
                    self._known,
                    method=result.method,
                    allocated_size_bytes=result.allocated_size_bytes,
                    shared_bytes=result.shared_bytes,
                )
                self.report(done=True)
            case messages.Failed(failure=failure):
                self.report(done=False, reason=failure.reason, detail=failure.message)
        return super().send(message, *descriptors, wait=wait)

    def report(self, *, done: bool, reason: str = "", detail: str = "") -> None:
        """Report the outcome, unless it was reported already."""
        if self._pipe < 0:
            return
        outcome = dataclasses.replace(
            self._known, done=done, reason=reason, detail=detail[:LONGEST_DETAIL]
        )
        # A Cancelled in the middle would lose it, or report it twice.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            # If the broker is gone, there is no record to keep.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._pipe, codec.encode(outcome))
            os.close(self._pipe)
            self._pipe = -1
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
