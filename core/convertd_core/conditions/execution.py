"""What ran out, broke, took too long or came between while a job was to run."""

from __future__ import annotations

from convertd_core.conditions import base


class ResourceExhausted(base.ConvertError):
    """Something ran out; the same request may pass later."""

    status = base.Status.RESOURCE_EXHAUSTED


class QueueFull(ResourceExhausted):
    """No further request can wait."""

    sentence = "the queue is full: {waiting} requests wait, {limit} are allowed for {whom}"
    waiting: int
    limit: int
    whom: str


class TooManyCalls(ResourceExhausted):
    """A user has as many calls going on as one may have, or takes no replies."""

    sentence = "too many calls: {limit} of your calls run or have replies that you did not read"
    limit: int


class NoSpace(ResourceExhausted):
    """The destination's file system is too full, now or by the end."""

    sentence = "{mount_point}: {path} needs {needed_bytes} bytes, and {free_bytes} bytes are free"
    path: str
    mount_point: str
    needed_bytes: int
    free_bytes: int


class QuotaExceeded(ResourceExhausted):
    """The owner's disk quota is used up."""

    sentence = "{path}: the disk quota of its owner is exhausted"
    path: str


class OutOfMemory(ResourceExhausted):
    """qemu-img needed more memory than it may have."""

    sentence = "qemu-img did not have enough memory"


class DataLoss(base.ConvertError):
    """Data could not be read or written. Nothing is published, unless the reason says so."""

    status = base.Status.DATA_LOSS


class ReadFailed(DataLoss):
    """The source can't be read in full."""

    sentence = "{path}: could not be read completely: {problem}"
    path: str
    problem: str


class WriteFailed(DataLoss):
    """The destination could not be written or flushed. Nothing is published."""

    sentence = "{path}: could not be written completely: {problem}"
    path: str
    problem: str


class VerifyFailed(DataLoss):
    """The result is not what it should be. Nothing is published."""

    sentence = "{path}: the result differs from the source: {problem}"
    path: str
    problem: str


class PublishedButNotDurable(DataLoss):
    """The result has its name, but its directory could not be flushed: a crash may undo that."""

    sentence = "{path}: is complete and in place, but its directory could not be flushed: {problem}"
    path: str
    problem: str


class Aborted(base.ConvertError):
    """Somebody or something else was there first."""

    status = base.Status.ABORTED


class DestBusy(Aborted):
    """Another job of the same caller writes this destination."""

    sentence = "{path}: another job of yours writes this file"
    path: str


class CancelledByOperator(Aborted):
    """An operator cancelled the job. Nothing is published."""

    sentence = "an operator cancelled the job; nothing was published"


class NameReplaced(Aborted):
    """Somebody put another file in place of the result as it was published."""

    sentence = "{path}: another process replaced the result while it was published"
    path: str


class SourceChanged(Aborted):
    """What was read is not what was opened: somebody wrote to it meanwhile."""

    sentence = "{path}: changed during the conversion: {problem}"
    path: str
    problem: str


class Cancelled(base.ConvertError):
    """The caller called it off."""

    status = base.Status.CANCELLED


class CancelledByCaller(Cancelled):
    """The caller cancelled the job, or went away. Nothing is published."""

    sentence = "the job was cancelled; nothing was published"


class DeadlineExceeded(base.ConvertError):
    """It took too long."""

    status = base.Status.DEADLINE_EXCEEDED


class Stalled(DeadlineExceeded):
    """Nothing moved for the stall limit: no percentage, no block written, no CPU time used."""

    sentence = "no progress for {stall_s} seconds; nothing was published"
    stall_s: float


class DurationExceeded(DeadlineExceeded):
    """The job took longer than the policy allows."""

    sentence = "the job took longer than {duration_s} seconds; nothing was published"
    duration_s: float


class Unimplemented(base.ConvertError):
    """Not with the convertd, the qemu-img or the kernel that is here."""

    status = base.Status.UNIMPLEMENTED


class Unsupported(Unimplemented):
    """A thing that this version of convertd, of qemu-img or of the kernel lacks."""

    sentence = "{what} is not supported: {why}"
    what: str
    why: str


class Unavailable(base.ConvertError):
    """Not now."""

    status = base.Status.UNAVAILABLE


class Stopping(Unavailable):
    """The daemon is stopping. Nothing is published; the same request will pass after a restart."""

    sentence = "the daemon is stopping; nothing was published"


class Internal(base.ConvertError):
    """A bug in convertd."""

    status = base.Status.INTERNAL


class InternalError(Internal):
    """A bug. The log has the same id, with the traceback."""

    sentence = "internal error; the log has it as {error_id}"
    error_id: str
