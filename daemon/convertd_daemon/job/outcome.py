"""What a job tells the broker of its end: once, by a pipe of its own, before the front hears of it.

The channel to the front is the caller's affair: whoever closes it ends the job. What goes on record
does not depend on anybody there.
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

    from convertd_core import values

LONGEST_DETAIL: Final = 2000
"""In characters. All of an account fits into an empty pipe, so that giving it never waits."""


class OutcomeReporter(channel.Channel):
    """A job's channel that gives the account when the job says how it ended.

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
        """Note what the message says, then send it. See Channel."""
        match message:
            case messages.Planned(plan=plan):
                self._known = _with_plan(self._known, plan)
            case messages.Inspected(chain=(image, *_)):
                self._known = dataclasses.replace(
                    self._known,
                    source_format=image.info.format,
                    virtual_size_bytes=image.info.virtual_size_bytes,
                )
                self.give(done=True)
            case messages.Succeeded(published=published):
                self._known = dataclasses.replace(
                    _with_plan(self._known, published.plan),
                    allocated_size_bytes=published.allocated_size_bytes,
                )
                self.give(done=True)
            case messages.Failed(failure=failure):
                self.give(done=False, reason=failure.reason, detail=failure.message)
        return super().send(message, *descriptors, wait=wait)

    def give(self, *, done: bool, reason: str = "", detail: str = "") -> None:
        """Give the account, if it was not given yet."""
        if self._pipe < 0:
            return
        account = dataclasses.replace(
            self._known, done=done, reason=reason, detail=detail[:LONGEST_DETAIL]
        )
        # A Cancelled in the middle would lose it, or give it twice.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            # A broker that is gone keeps no record any more.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._pipe, codec.encode(account))
            os.close(self._pipe)
            self._pipe = -1
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _with_plan(known: messages.JobOutcome, plan: values.Plan) -> messages.JobOutcome:
    source = plan.chain[0].info
    return dataclasses.replace(
        known,
        source_format=source.format,
        source_cache=str(plan.source_cache.mode),
        dest_cache=str(plan.dest_cache.mode),
        virtual_size_bytes=source.virtual_size_bytes,
    )
