"""What ends a job early: its caller, the broker, its time limit.

The job's channel leads to the front. When the front closes it, or dies, the result is no longer
wanted. The broker sends SIGTERM. Both raise `Cancelled`: the job ends without sending anything
more.
"""

from __future__ import annotations

import contextlib
import select
import signal
import time
from typing import TYPE_CHECKING, NoReturn

from convertd_core import conditions, messages, results, values
from convertd_daemon import channel

if TYPE_CHECKING:
    from collections.abc import Iterator


class Cancelled(BaseException):
    """The job must end at once. Not an Exception, so that no handler catches it by accident."""


class JobContext:
    """A job's end of its channel, and its time. Owns neither.

    `undefined_device` is the device whose content is undefined if the job fails now; "" for none.
    """

    def __init__(self, channel_: channel.Channel, duration_s: float) -> None:
        self.channel = channel_
        self.duration_s = duration_s
        self.started = time.monotonic()
        self.undefined_device = ""
        self._sent: results.Progress | None = None
        self._poll = select.poll()
        self._poll.register(channel_.fileno(), 0)

    @property
    def seconds(self) -> float:
        """How long the job has run."""
        return time.monotonic() - self.started

    def check(self) -> None:
        """Stop here if the result is no longer wanted, or if the job took too long.

        Raises:
            Cancelled: the channel is closed.
            conditions.DurationExceeded: the policy's `duration` is over.
        """
        if self._poll.poll(0):
            raise Cancelled
        if self.seconds > self.duration_s:
            raise conditions.DurationExceeded(duration_s=self.duration_s)

    def send(self, message: object) -> None:
        """Send a message that must arrive.

        Raises:
            Cancelled: the channel is closed.
            conditions.Unsupported: it does not fit into a message.
        """
        try:
            self.channel.send(message)
        except channel.Closed as error:
            raise Cancelled from error
        except channel.TooLong as error:
            problem = "its description does not fit into a message"
            raise conditions.Unsupported(
                what="an image with so much metadata", why=problem
            ) from error

    def send_failure(self, error: conditions.ConvertError) -> None:
        """Send how the job fails, before a clean-up that may take long.

        Raises:
            Cancelled: the channel is closed.
        """
        error.undefined_device = self.undefined_device
        self.send(messages.Failed(failure=error.failure()))

    def progress(self, phase: values.Phase, percent: float = 0.0) -> None:
        """Send how far the job is, unless that is what was sent last.

        Dropped if the front is behind: a job never waits for that.
        """
        progress = results.Progress(phase=phase, percent=percent)
        if progress == self._sent:
            return
        try:
            if self.channel.send(messages.Progressed(progress=progress), wait=False):
                self._sent = progress
        except channel.Closed as error:
            raise Cancelled from error


def cancel_on_sigterm() -> None:
    """Make SIGTERM a Cancelled, wherever the job is."""
    signal.signal(signal.SIGTERM, _cancel)


def ignore_sigterm() -> None:
    """Ignore SIGTERM: the job is ending anyway.

    Not SIG_IGN: Python would print a traceback for a signal that arrives at that moment.
    """
    signal.signal(signal.SIGTERM, _ignore)


def _ignore(_number: int, _frame: object) -> None:
    pass


def _cancel(_number: int, _frame: object) -> NoReturn:
    raise Cancelled


@contextlib.contextmanager
def defer_sigterm() -> Iterator[None]:
    """Block SIGTERM in the block: a result that is being published is reported as published."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
