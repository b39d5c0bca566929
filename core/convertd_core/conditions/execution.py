"""Conditions of a job that runs: exhausted, failed, overtaken, cancelled, too slow."""

from __future__ import annotations

from convertd_core.conditions import base


class QueueFull(base.ConvertError, status=base.Status.RESOURCE_EXHAUSTED):
    """Too many requests wait already."""

    sentence = "the queue is full: {waiting} requests wait, {limit} are allowed for {whom}"
    waiting: int
    limit: int
    whom: str


class TooManyCalls(base.ConvertError, status=base.Status.RESOURCE_EXHAUSTED):
    """A user has too many open calls, or reads no replies."""

    sentence = "too many calls: {limit} of your calls run or have replies that you did not read"
    limit: int


class NoSpace(base.ConvertError, status=base.Status.RESOURCE_EXHAUSTED):
    """The destination's file system is too full, now or by the end."""

    sentence = "{mount_point}: {path} needs {needed_bytes} bytes, and {free_bytes} bytes are free"
    path: str
    mount_point: str
    needed_bytes: int
    free_bytes: int


class QuotaExceeded(base.ConvertError, status=base.Status.RESOURCE_EXHAUSTED):
    """The owner's disk quota is used up."""

    sentence = "{path}: the disk quota of its owner is exhausted"
    path: str


class OutOfMemory(base.ConvertError, status=base.Status.RESOURCE_EXHAUSTED):
    """qemu-img needed more memory than it may have."""

    sentence = "qemu-img did not have enough memory"


class ReadFailed(base.ConvertError, status=base.Status.DATA_LOSS):
    """The source can't be read in full."""

    sentence = "{path}: could not be read completely: {problem}"
    path: str
    problem: str


class WriteFailed(base.ConvertError, status=base.Status.DATA_LOSS):
    """The destination could not be written or flushed. Nothing is published."""

    sentence = "{path}: could not be written completely: {problem}"
    path: str
    problem: str


class VerifyFailed(base.ConvertError, status=base.Status.DATA_LOSS):
    """The result is not what it should be. Nothing is published."""

    sentence = "{path}: the result differs from the source: {problem}"
    path: str
    problem: str


class PublishedButNotDurable(base.ConvertError, status=base.Status.DATA_LOSS):
    """The result has its name, but its directory could not be flushed: a crash may undo that."""

    sentence = "{path}: is complete and in place, but its directory could not be flushed: {problem}"
    path: str
    problem: str


class DestBusy(base.ConvertError, status=base.Status.ABORTED):
    """Another job of the same caller writes this destination."""

    sentence = "{path}: another job of yours writes this file"
    path: str


class CancelledByOperator(base.ConvertError, status=base.Status.ABORTED):
    """An operator cancelled the job. Nothing is published."""

    sentence = "an operator cancelled the job; nothing was published"


class NameReplaced(base.ConvertError, status=base.Status.ABORTED):
    """Somebody put another file in place of the result as it was published."""

    sentence = "{path}: another process replaced the result while it was published"
    path: str


class SourceChanged(base.ConvertError, status=base.Status.ABORTED):
    """The source was written to during the conversion."""

    sentence = "{path}: changed during the conversion: {problem}"
    path: str
    problem: str


class CancelledByCaller(base.ConvertError, status=base.Status.CANCELLED):
    """The caller cancelled the job, or went away. Nothing is published."""

    sentence = "the job was cancelled; nothing was published"


class Stalled(base.ConvertError, status=base.Status.DEADLINE_EXCEEDED):
    """Nothing moved for the stall limit: no percentage, no block written, no CPU time used."""

    sentence = "no progress for {stall_s} seconds; nothing was published"
    stall_s: float


class DurationExceeded(base.ConvertError, status=base.Status.DEADLINE_EXCEEDED):
    """The job took longer than the policy allows."""

    sentence = "the job took longer than {duration_s} seconds; nothing was published"
    duration_s: float


class Unsupported(base.ConvertError, status=base.Status.UNIMPLEMENTED):
    """A thing that this version of convertd, of qemu-img or of the kernel lacks."""

    sentence = "{what} is not supported: {why}"
    what: str
    why: str


class Stopping(base.ConvertError, status=base.Status.UNAVAILABLE):
    """The daemon is stopping. Nothing is published; the same request will pass after a restart."""

    sentence = "the daemon is stopping; nothing was published"


class InternalError(base.ConvertError, status=base.Status.INTERNAL):
    """A bug. The log has the same id, with the traceback."""

    sentence = "internal error; the log has it as {error_id}"
    error_id: str
