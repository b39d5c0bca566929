"""What ends a job before its work is done: its caller, the broker, its time.

The job's channel leads to the front. When the front closes it, or dies, nobody waits for the result
any more. The broker sends SIGTERM. Both are a `Cut`: the job ends without another word, and whoever
cut it knows why.
"""

from __future__ import annotations

import contextlib
import select
import signal
import time
from typing import TYPE_CHECKING, NoReturn

from convertd_daemon import channel, errors, model

if TYPE_CHECKING:
    from collections.abc import Iterator


class Cut(BaseException):
    """The job is to end at once. Not an Exception: nobody should handle it by accident."""


class Leash:
    """A job's end of its channel, and its time. Owns neither.

    `undefined_device` is the device that holds what nobody knows, should the job fail now.
    """

    def __init__(self, line: channel.Channel, duration_s: float) -> None:
        self.line = line
        self.duration_s = duration_s
        self.started = time.monotonic()
        self.undefined_device = ""
        self._told: model.Progress | None = None
        self._poll = select.poll()
        self._poll.register(line.fileno(), 0)

    @property
    def seconds(self) -> float:
        """How long the job has run."""
        return time.monotonic() - self.started

    def check(self) -> None:
        """Stop here if nobody waits for the result, or if it took too long.

        Raises:
            Cut: the channel is closed.
            errors.DurationExceeded: the policy's `duration` is over.
        """
        if self._poll.poll(0):
            raise Cut
        if self.seconds > self.duration_s:
            raise errors.DurationExceeded(duration_s=self.duration_s)

    def tell(self, message: object) -> None:
        """Send what must arrive.

        Raises:
            Cut: nobody is there to hear it.
            errors.Unsupported: it is too long to be told.
        """
        try:
            self.line.send(message)
        except channel.Closed as error:
            raise Cut from error
        except channel.TooLong as error:
            problem = "what there is to say of it does not fit into a message"
            raise errors.Unsupported(what="so much in an image", why=problem) from error

    def tell_failed(self, error: errors.ConvertError) -> None:
        """Send how the job fails, before what may take long.

        Raises:
            Cut: nobody is there to hear it.
        """
        error.undefined_device = self.undefined_device
        self.tell(channel.Failed(failure=error.failure()))

    def progress(self, phase: model.Phase, percent: float = 0.0) -> None:
        """Send how far the job is, unless that is what was said last.

        Dropped if the front is behind: a job never waits for that.
        """
        progress = model.Progress(phase=phase, percent=percent)
        if progress == self._told:
            return
        try:
            if self.line.send(channel.Progressed(progress=progress), wait=False):
                self._told = progress
        except channel.Closed as error:
            raise Cut from error


def end_on_sigterm() -> None:
    """Make SIGTERM a Cut, wherever the job is."""
    signal.signal(signal.SIGTERM, _cut)


def outlive_sigterm() -> None:
    """Make SIGTERM nothing: the job ends anyway.

    Not SIG_IGN: of a signal that comes just then, Python would print a traceback.
    """
    signal.signal(signal.SIGTERM, _pass_over)


def _pass_over(_number: int, _frame: object) -> None:
    pass


def _cut(_number: int, _frame: object) -> NoReturn:
    raise Cut


@contextlib.contextmanager
def no_way_back() -> Iterator[None]:
    """Hold SIGTERM back: what is published is reported, not taken back half-way."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
