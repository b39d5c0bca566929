"""Every condition that a caller can meet, one class each, and the gRPC status it becomes.

    ConvertError
    ├── Unauthenticated          UnknownConnection
    ├── Denied                   PermissionDenied, FormatNotAllowed, ClaimNotAllowed
    ├── Invalid                  BadPath, BadFormat, BadOption, BadMessage, SecretMissing, …
    ├── NotFound                 SourceNotFound, DirectoryNotFound, JobNotFound
    ├── AlreadyExists            DestExists
    ├── FailedPrecondition       ImageRefused, FormatMismatch, ImageTooLarge, ImageInUse, …
    ├── ResourceExhausted        QueueFull, TooManyCalls, NoSpace, QuotaExceeded, …
    ├── DataLoss                 ReadFailed, WriteFailed, VerifyFailed, PublishedButNotDurable
    ├── Aborted                  DestBusy, CancelledByOperator, NameReplaced, SourceChanged
    ├── Cancelled                CancelledByCaller
    ├── DeadlineExceeded         Stalled, DurationExceeded
    ├── Unimplemented            Unsupported
    ├── Unavailable              Stopping
    └── Internal                 InternalError

A condition's values are its attributes, its message is one sentence with those values in it, and
its `reason` is its class's name in UPPER_SNAKE: what `google.rpc.ErrorInfo` carries, and what
outsiders may rely on. `Failure` is a condition on its way through a channel.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import ClassVar, dataclass_transform


class Status(enum.StrEnum):
    """The names of gRPC's status codes, for the process that may not import gRPC."""

    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DATA_LOSS = "DATA_LOSS"
    ABORTED = "ABORTED"
    CANCELLED = "CANCELLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A condition between processes: its reason, its sentence, its values as text."""

    reason: str
    message: str
    values: tuple[tuple[str, str], ...] = ()

    def with_undefined(self, device: str) -> Failure:
        """The same, of a conversion that had begun to write to a device."""
        return Failure(
            reason=self.reason,
            message=f"{self.message}; the content of {device} is undefined now",
            values=(*self.values, ("device", device), ("device_content", "undefined")),
        )

    @property
    def status(self) -> Status:
        """The gRPC status of the reason; INTERNAL for one that no condition has."""
        return BY_REASON.get(self.reason, InternalError).status


BY_REASON: dict[str, type[ConvertError]] = {}
"""Every condition by its reason. Filled as the classes below are made."""


@dataclass_transform(kw_only_default=True, eq_default=False)
class ConvertError(Exception):
    """A conversion that was not done, for a reason that its caller can act on.

    A subclass with a `sentence` is a condition: it becomes a dataclass of its annotations.
    """

    status: ClassVar[Status]
    reason: ClassVar[str]
    sentence: ClassVar[str]
    undefined_device = ""
    """The device on which the conversion had begun to write, if it had."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "sentence" in vars(cls):
            cls.reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).upper()
            dataclass(kw_only=True, eq=False)(cls)
            BY_REASON[cls.reason] = cls

    def __str__(self) -> str:
        return self.sentence.format(**self.values())

    def values(self) -> dict[str, object]:
        """The condition's values by name, as they stand in the sentence."""
        return {name: getattr(self, name) for name in getattr(self, "__dataclass_fields__", ())}

    def failure(self) -> Failure:
        """The condition as it passes between processes, whatever text its values hold."""
        values = tuple((name, _sendable(str(value))) for name, value in self.values().items())
        failure = Failure(reason=self.reason, message=_sendable(str(self)), values=values)
        if self.undefined_device:
            return failure.with_undefined(self.undefined_device)
        return failure


def _sendable(text: str) -> str:
    """The text in valid Unicode: a lone surrogate can't be encoded, and who sent it is answered."""
    return text.encode("utf-8", "backslashreplace").decode()


# --- who ---------------------------------------------------------------------------------------


class Unauthenticated(ConvertError):
    """The daemon doesn't know who calls."""

    status = Status.UNAUTHENTICATED


class UnknownConnection(Unauthenticated):
    """The call came over a connection that the daemon did not accept, or that has ended."""

    sentence = "the daemon does not know who is at the other end of this connection"


class Denied(ConvertError):
    """The policy says no."""

    status = Status.PERMISSION_DENIED


class PermissionDenied(Denied):
    """No rule allows this. Says the same whether or not the paths exist."""

    sentence = "the policy does not allow uid {uid} to {action}"
    uid: int
    action: str


# --- what was asked ----------------------------------------------------------------------------


class Invalid(ConvertError):
    """The request can't be meant: no state of the system would make it right."""

    status = Status.INVALID_ARGUMENT


class BadPath(Invalid):
    """A path that is not absolute, or has `..`, a NUL or an empty name in it."""

    sentence = "{field}: {path!r} {problem}"
    field: str
    path: str
    problem: str


class BadFormat(Invalid):
    """A format that convertd does not know, or can't write."""

    sentence = "{field}: {format!r} is not a format that can be used here"
    field: str
    format: str


class BadOption(Invalid):
    """An option that has no such value, or does not go with another one."""

    sentence = "{field}: {problem}"
    field: str
    problem: str


class SecretMissing(Invalid):
    """An encrypted image, and no passphrase for it."""

    sentence = "{path}: is encrypted; give its passphrase"
    path: str


class SizeNotPossible(Invalid):
    """The destination's format, with the options asked for, has no images of the source's size."""

    sentence = (
        "{path}: {size_bytes} bytes are not possible in the format {format} with these options,"
        " which has {least_bytes} to {most_bytes}"
    )
    path: str
    format: str
    size_bytes: int
    least_bytes: int
    most_bytes: int


class BadMessage(Invalid):
    """Bytes that are not the request they should be."""

    sentence = "the request can't be read: {problem}"
    problem: str


# --- what is there -----------------------------------------------------------------------------


class NotFound(ConvertError):
    """Allowed, but not there."""

    status = Status.NOT_FOUND


class SourceNotFound(NotFound):
    """There is no file of that name."""

    sentence = "{path}: no such file"
    path: str


class DirectoryNotFound(NotFound):
    """The destination's directory, or the root, is not there."""

    sentence = "{path}: the directory is not there"
    path: str


class JobNotFound(NotFound):
    """No such job, or another user's: the answer is the same."""

    sentence = "there is no job {job_id!r} of yours"
    job_id: str


class AlreadyExists(ConvertError):
    """There is something already."""

    status = Status.ALREADY_EXISTS


class DestExists(AlreadyExists):
    """The destination exists, and overwriting was not asked for."""

    sentence = "{path}: exists; ask to overwrite it, or choose another name"
    path: str


# --- what stands in the way --------------------------------------------------------------------


class FailedPrecondition(ConvertError):
    """The request is fine, the state of things is not: repeating it changes nothing."""

    status = Status.FAILED_PRECONDITION


class AccessRefused(FailedPrecondition):
    """The kernel refused: the rights in force (see `access` of the root) do not suffice."""

    sentence = "{path}: the kernel refused access with the rights of {rights}"
    path: str
    rights: str


class SymlinkInPath(FailedPrecondition):
    """A symbolic link where none is followed."""

    sentence = "{path}: a symbolic link is on the way, and is not followed"
    path: str


class OutsideRoot(FailedPrecondition):
    """The path leads out of its root: over a mount point, a link, or into another root."""

    sentence = "{path}: leads out of the root {root}"
    path: str
    root: str


class RootUnusable(FailedPrecondition):
    """The root that the path lies in can't be opened as it is, or must not be."""

    sentence = "the root {root} can't be used: {problem}"
    root: str
    problem: str


class NotAnImage(FailedPrecondition):
    """Not a regular file in a root of files, not a block device in a root of devices."""

    sentence = "{path}: is {found}, not {wanted}"
    path: str
    found: str
    wanted: str


class ReadOnlyFileSystem(FailedPrecondition):
    """Nothing can be created there."""

    sentence = "{path}: the file system is read-only"
    path: str


class ProtectedByAttribute(FailedPrecondition):
    """chattr(1) keeps a directory or a file as it is, even from root."""

    sentence = "{path}: is {attribute} (see chattr(1)), so the result can't be put there"
    path: str
    attribute: str


class OwnerNotKept(FailedPrecondition):
    """The destination's file system has no owners or modes, or others than were asked for."""

    sentence = "{path}: its file system makes it {found} instead of {wanted}"
    path: str
    found: str
    wanted: str


class NotYours(FailedPrecondition):
    """The policy lets a caller overwrite its own files only."""

    sentence = "{path}: belongs to another user, and the policy lets you overwrite your own only"
    path: str


class ImageRefused(FailedPrecondition):
    """An image that qemu-img can't read as what it should be, or that asks for more than itself.

    qemu-img's own words are in the daemon's log only: about opening they tell which files exist.
    """

    sentence = "{path}: the image is refused: {problem}"
    path: str
    problem: str


class FormatMismatch(FailedPrecondition):
    """The image is of another format than the caller said."""

    sentence = "{path}: is not of the format {format}"
    path: str
    format: str


class AmbiguousFormat(FailedPrecondition):
    """No format was stated, and the bytes fit a disk as well as something else.

    Taken for the wrong one, it would become a disk of rubbish without a word. Stated, it is read.
    """

    sentence = "{path}: looks like {found}; {remedy}"
    path: str
    found: str
    remedy: str


class FormatNotAllowed(Denied):
    """The image was found to be of a format that the policy does not let this caller read."""

    sentence = "{path}: is of the format {format}, which the policy does not allow here"
    path: str
    format: str


class BackingRefused(FailedPrecondition):
    """An image that stands on another one, which this caller can't have read through it."""

    sentence = "{path}: its backing file {backing!r} is refused: {problem}"
    path: str
    backing: str
    problem: str


class ImageDamaged(FailedPrecondition):
    """An image that is damaged, with all its data in place: it can be converted if that is asked.

    What has to be asked is `accept_damaged` of the source.
    """

    sentence = "{path}: is damaged, though its data is there: {problem}; ask to accept that"
    path: str
    problem: str


class WrongSecret(FailedPrecondition):
    """The passphrase does not open the image."""

    sentence = "{path}: the passphrase does not open it"
    path: str


class DeviceTooSmall(FailedPrecondition):
    """The image does not fit on the device. Nothing was written."""

    sentence = "{path}: has {size_bytes} bytes, the image needs {needed_bytes}"
    path: str
    size_bytes: int
    needed_bytes: int


class NoDirectWrites(FailedPrecondition):
    """A cache mode was asked for that the destination's file system does not do."""

    sentence = "{path}: takes no direct writes, which cache mode {mode} needs: {problem}"
    path: str
    mode: str
    problem: str


class ClaimNotAllowed(Denied):
    """`is_zero` was claimed of a device, and the policy's root does not allow the claim."""

    sentence = "{path}: the policy does not let you claim that it is zero already"
    path: str


class DamageNotAllowed(Denied):
    """A damaged image was to be accepted, and the policy's root does not allow that."""

    sentence = "{path}: is damaged, and the policy does not let you accept that: {problem}"
    path: str
    problem: str


class DeviceNotWritable(FailedPrecondition):
    """The device's mode does not let its group write, and qemu-img has no other right to it."""

    sentence = "{path}: its group {group} may not write it (mode {mode})"
    path: str
    group: int
    mode: str


class ImageTooLarge(FailedPrecondition):
    """More virtual size than the policy allows, or than the destination holds."""

    sentence = "{path}: a virtual size of {size_bytes} bytes is over the limit of {limit_bytes}"
    path: str
    size_bytes: int
    limit_bytes: int


class ImageInUse(FailedPrecondition):
    """Another process (a running qemu, most likely) has locked the image."""

    sentence = "{path}: is in use by another process"
    path: str


# --- what ran out ------------------------------------------------------------------------------


class ResourceExhausted(ConvertError):
    """Something ran out; the same request may pass later."""

    status = Status.RESOURCE_EXHAUSTED


class QueueFull(ResourceExhausted):
    """No further request can wait."""

    sentence = "the queue is full: {waiting} requests wait, {limit} are allowed for {whom}"
    waiting: int
    limit: int
    whom: str


class TooManyCalls(ResourceExhausted):
    """A user has as many calls going on as one may have, or takes no replies."""

    sentence = "{limit} of your calls go on or have replies that were not taken, which is the limit"
    limit: int


class NoSpace(ResourceExhausted):
    """The destination's file system is too full, now or by the end."""

    sentence = "{mount_point}: needs {needed_bytes} bytes for {path}, has {free_bytes} free"
    path: str
    mount_point: str
    needed_bytes: int
    free_bytes: int


class QuotaExceeded(ResourceExhausted):
    """The owner's disk quota is used up."""

    sentence = "{path}: the disk quota of its owner is used up"
    path: str


class OutOfMemory(ResourceExhausted):
    """qemu-img needed more memory than it may have."""

    sentence = "qemu-img was stopped for want of memory"


# --- what broke --------------------------------------------------------------------------------


class DataLoss(ConvertError):
    """Data could not be read or written. Nothing is published, unless the reason says so."""

    status = Status.DATA_LOSS


class ReadFailed(DataLoss):
    """The source can't be read in full."""

    sentence = "{path}: could not be read in full: {problem}"
    path: str
    problem: str


class WriteFailed(DataLoss):
    """The destination could not be written or flushed. Nothing is published."""

    sentence = "{path}: could not be written in full: {problem}"
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


class ConversionFailed(FailedPrecondition):
    """qemu-img gave up for a reason that is none of those above."""

    sentence = "{path}: qemu-img failed: {problem}"
    path: str
    problem: str


# --- what came between -------------------------------------------------------------------------


class Aborted(ConvertError):
    """Somebody or something else was there first."""

    status = Status.ABORTED


class DestBusy(Aborted):
    """Another job of the same caller writes this destination."""

    sentence = "{path}: is being written by another job of yours"
    path: str


class CancelledByOperator(Aborted):
    """An operator cancelled the job. Nothing is published."""

    sentence = "an operator cancelled the job; nothing was published"


class NameReplaced(Aborted):
    """Somebody put another file in place of the result as it was published."""

    sentence = "{path}: was replaced by somebody else as it was published"
    path: str


class SourceChanged(Aborted):
    """What was read is not what was opened: somebody wrote to it meanwhile."""

    sentence = "{path}: changed while it was being converted: {problem}"
    path: str
    problem: str


class Cancelled(ConvertError):
    """The caller called it off."""

    status = Status.CANCELLED


class CancelledByCaller(Cancelled):
    """The caller cancelled the job, or went away. Nothing is published."""

    sentence = "the job was cancelled; nothing was published"


class DeadlineExceeded(ConvertError):
    """It took too long."""

    status = Status.DEADLINE_EXCEEDED


class Stalled(DeadlineExceeded):
    """Nothing moved for the stall limit: no percentage, no block written, no CPU time used."""

    sentence = "nothing moved for {stall_s} seconds; nothing was published"
    stall_s: float


class DurationExceeded(DeadlineExceeded):
    """The job took longer than the policy allows."""

    sentence = "the job took longer than {duration_s} seconds; nothing was published"
    duration_s: float


# --- what the daemon can't do ------------------------------------------------------------------


class Unimplemented(ConvertError):
    """Not with the convertd, the qemu-img or the kernel that is here."""

    status = Status.UNIMPLEMENTED


class Unsupported(Unimplemented):
    """A thing that this version of convertd, of qemu-img or of the kernel lacks."""

    sentence = "{what} is not supported: {why}"
    what: str
    why: str


class Unavailable(ConvertError):
    """Not now."""

    status = Status.UNAVAILABLE


class Stopping(Unavailable):
    """The daemon is stopping. Nothing is published; the same request will pass after a restart."""

    sentence = "the daemon is stopping; nothing was published"


class Internal(ConvertError):
    """A bug in convertd."""

    status = Status.INTERNAL


class InternalError(Internal):
    """A bug. The log has the same id, with the traceback."""

    sentence = "an internal error, recorded in the log as {error_id}"
    error_id: str
