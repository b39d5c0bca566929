"""What ends a job before its work is done: its caller, the broker, its time.

The job's channel leads to the front. When the front closes it, or dies, nobody waits for the result
any more. The broker sends SIGTERM. Both are a `Cancelled`: the job ends without another word, and
whoever cut it knows why.
"""

from __future__ import annotations

import contextlib
import select
import signal
import time
from typing import TYPE_CHECKING, NoReturn

from convertd_core import conditions, messages, values
from convertd_daemon import channel

if TYPE_CHECKING:
    from collections.abc import Iterator


class Cancelled(BaseException):
    """The job is to end at once. Not an Exception: nobody should handle it by accident."""


class JobContext:
    """A job's end of its channel, and its time. Owns neither.

    `undefined_device` is the device that holds what nobody knows, should the job fail now.
    """

    def __init__(self, channel_: channel.Channel, duration_s: float) -> None:
        self.channel = channel_
        self.duration_s = duration_s
        self.started = time.monotonic()
        self.undefined_device = ""
        self._told: values.Progress | None = None
        self._poll = select.poll()
        self._poll.register(channel_.fileno(), 0)

    @property
    def seconds(self) -> float:
        """How long the job has run."""
        return time.monotonic() - self.started

    def check(self) -> None:
        """Stop here if nobody waits for the result, or if it took too long.

        Raises:
            Cancelled: the channel is closed.
            conditions.DurationExceeded: the policy's `duration` is over.
        """
        if self._poll.poll(0):
            raise Cancelled
        if self.seconds > self.duration_s:
            raise conditions.DurationExceeded(duration_s=self.duration_s)

    def send(self, message: object) -> None:
        """Send what must arrive.

        Raises:
            Cancelled: nobody is there to hear it.
            conditions.Unsupported: it is too long to be told.
        """
        try:
            self.channel.send(message)
        except channel.Closed as error:
            raise Cancelled from error
        except channel.TooLong as error:
            problem = "what there is to say of it does not fit into a message"
            raise conditions.Unsupported(what="so much in an image", why=problem) from error

    def send_failure(self, error: conditions.ConvertError) -> None:
        """Send how the job fails, before what may take long.

        Raises:
            Cancelled: nobody is there to hear it.
        """
        error.undefined_device = self.undefined_device
        self.send(messages.Failed(failure=error.failure()))

    def progress(self, phase: values.Phase, percent: float = 0.0) -> None:
        """Send how far the job is, unless that is what was said last.

        Dropped if the front is behind: a job never waits for that.
        """
        progress = values.Progress(phase=phase, percent=percent)
        if progress == self._told:
            return
        try:
            if self.channel.send(messages.Progressed(progress=progress), wait=False):
                self._told = progress
        except channel.Closed as error:
            raise Cancelled from error


def cancel_on_sigterm() -> None:
    """Make SIGTERM a Cancelled, wherever the job is."""
    signal.signal(signal.SIGTERM, _cancel)


def ignore_sigterm() -> None:
    """Make SIGTERM nothing: the job ends anyway.

    Not SIG_IGN: of a signal that comes just then, Python would print a traceback.
    """
    signal.signal(signal.SIGTERM, _ignore)


def _ignore(_number: int, _frame: object) -> None:
    pass


def _cancel(_number: int, _frame: object) -> NoReturn:
    raise Cancelled


@contextlib.contextmanager
def defer_sigterm() -> Iterator[None]:
    """Hold SIGTERM back: what is published is reported, not taken back half-way."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
