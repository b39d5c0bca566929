"""Every way in which a call can fail, as the caller sees it.

    ConvertError
    ├── Unauthenticated
    ├── PermissionDenied
    ├── InvalidArgument
    ├── NotFound
    ├── AlreadyExists
    ├── FailedPrecondition
    │   └── ImageRefused             the image itself is at fault
    ├── ResourceExhausted
    │   ├── QueueFull                the same call may pass in a while
    │   └── NoSpace                  the destination's file system is too small
    ├── DataLoss
    │   └── PublishedButNotDurable   the result is there, whole; a power cut may undo its name
    ├── Aborted
    ├── Cancelled
    ├── DeadlineExceeded
    ├── Unimplemented
    ├── Unavailable                  nothing was done; the same call may pass later
    │   └── Unreachable              the daemon was not reached, or a question to it got lost
    ├── Internal
    └── OutcomeUnknown               the connection broke: the result may be there or not

One class for each gRPC status, so that `except` reads like the contract; `reason` tells the
conditions of a status apart. A class of its own has only a condition after which a caller acts
differently. Whatever the error, a file that was to be made is there whole or not at all. A device
is another matter: if its content is undefined now, metadata has `device_content`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from convertd_core import conditions

BY_STATUS: Final[dict[str, type[ConvertError]]] = {}
"""The class of every status that the daemon uses. Filled as the classes below are made."""


class ConvertError(Exception):
    """A call that did not do what was asked.

    `message` is one sentence for people, `reason` is for programs (UPPER_SNAKE_CASE, stable), and
    `metadata` has every value that the message names, as text. Such texts may hold what others
    chose, file names for one: escape them before you show them on a terminal.
    """

    status: ClassVar[str] = "UNKNOWN"
    """The gRPC status, by name."""

    def __init_subclass__(cls, *, status: str = "") -> None:
        super().__init_subclass__()
        if status:
            cls.status = status
            BY_STATUS[status] = cls

    def __init__(
        self, message: str, *, reason: str, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata: Mapping[str, str] = dict(metadata or {})

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle whole: services hand exceptions from process to process."""
        return _restored, (type(self), self.message, self.reason, dict(self.metadata))


def _restored(
    kind: type[ConvertError], message: str, reason: str, metadata: dict[str, str]
) -> ConvertError:
    return kind(message, reason=reason, metadata=metadata)


class Unauthenticated(ConvertError, status="UNAUTHENTICATED"):
    """The daemon does not know who calls."""


class PermissionDenied(ConvertError, status="PERMISSION_DENIED"):
    """The policy does not allow it. It is the same answer whether or not the files exist."""


class InvalidArgument(ConvertError, status="INVALID_ARGUMENT"):
    """The request can't be meant, whatever the state of things. Raised by the client too."""


class NotFound(ConvertError, status="NOT_FOUND"):
    """Allowed, but not there."""


class AlreadyExists(ConvertError, status="ALREADY_EXISTS"):
    """The destination exists, and `overwrite` was not asked for."""


class FailedPrecondition(ConvertError, status="FAILED_PRECONDITION"):
    """The request is fine, the state of things is not. Repeating it changes nothing."""


class ImageRefused(FailedPrecondition):
    """The image is at fault: unreadable as what it should be, or it refers to other files."""


class ResourceExhausted(ConvertError, status="RESOURCE_EXHAUSTED"):
    """Something ran out. The same request may pass later."""


class QueueFull(ResourceExhausted):
    """Too many requests wait already, of yours or in all."""


class NoSpace(ResourceExhausted):
    """The file system is too full; metadata has `needed_bytes`, `free_bytes`, `mount_point`."""


class DataLoss(ConvertError, status="DATA_LOSS"):
    """Data could not be read or written. Nothing was published, except as a subclass says."""


class PublishedButNotDurable(DataLoss):
    """The result is complete and in place, but a crash of the machine may still undo its name."""


class Aborted(ConvertError, status="ABORTED"):
    """Somebody or something else came between."""


class Cancelled(ConvertError, status="CANCELLED"):
    """The caller cancelled the job. Nothing was published."""


class DeadlineExceeded(ConvertError, status="DEADLINE_EXCEEDED"):
    """It took too long: for the policy, or (reason TIMEOUT) for the call's own `timeout`."""


class Unimplemented(ConvertError, status="UNIMPLEMENTED"):
    """The client, the daemon, its qemu-img or its kernel lacks it."""


class Unavailable(ConvertError, status="UNAVAILABLE"):
    """Not now. Nothing was done, and the same call may pass later."""


class Unreachable(Unavailable):
    """The daemon could not be reached, so nothing was done.

    The reason is SOCKET_MISSING, CONNECTION_REFUSED, NOT_A_SOCKET, SOCKET_NOT_PERMITTED,
    NOT_ANSWERING, or, for a call that changes nothing, CONNECTION_LOST.
    """


class Internal(ConvertError, status="INTERNAL"):
    """A bug in convertd; the id in the message finds its traceback in the daemon's log."""


class OutcomeUnknown(ConvertError):
    """The daemon's answer got lost: the conversion was done or it was not.

    Look at the destination before the call is made again. A file is there whole or not at all.
    """


_OF_THEIR_OWN: Final[Mapping[type[conditions.ConvertError], type[ConvertError]]] = {
    conditions.ImageAtFault: ImageRefused,
    conditions.QueueFull: QueueFull,
    conditions.NoSpace: NoSpace,
    conditions.PublishedButNotDurable: PublishedButNotDurable,
}
"""The conditions after which a caller acts differently than after others of the same status."""


def _kind_of(reason: str, otherwise: type[ConvertError]) -> type[ConvertError]:
    """The class of a reason that a daemon or a job gives. A newer daemon may know more."""
    condition = conditions.BY_REASON.get(reason)
    if condition is None:
        return otherwise
    for kind, ours in _OF_THEIR_OWN.items():
        if issubclass(condition, kind):
            return ours
    return BY_STATUS[condition.status]


def of_status(status: str, reason: str, message: str, metadata: Mapping[str, str]) -> ConvertError:
    """Make the error for what a daemon answered. A reason not known here goes by its status."""
    kind = _kind_of(reason, ConvertError)
    if kind.status != status:
        kind = BY_STATUS.get(status, ConvertError)
    return kind(message, reason=reason, metadata=metadata)


def of_reason(reason: str, message: str, metadata: Mapping[str, str]) -> ConvertError:
    """Make the error for what a job reports, which states no status."""
    kind = _kind_of(reason, Internal)
    return kind(message, reason=reason, metadata=metadata)


def unsupported(what: str, why: str) -> Unimplemented:
    """Make the error for what can't be had here, as the daemon words it."""
    condition = conditions.Unsupported(what=what, why=why)
    return Unimplemented(
        str(condition), reason=condition.reason, metadata={"what": what, "why": why}
    )
