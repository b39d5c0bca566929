"""Who may ask, what can be asked, and what is there: refused before anything is opened or read."""

from __future__ import annotations

from convertd_core.conditions import base


class Unauthenticated(base.ConvertError):
    """The daemon doesn't know who calls."""

    status = base.Status.UNAUTHENTICATED


class UnknownConnection(Unauthenticated):
    """The call came over a connection that the daemon did not accept, or that has ended."""

    sentence = "the daemon does not know who opened this connection"


class Denied(base.ConvertError):
    """The policy says no."""

    status = base.Status.PERMISSION_DENIED


class PermissionDenied(Denied):
    """No rule allows this. Says the same whether or not the paths exist."""

    sentence = "the policy does not allow uid {uid} to {action}"
    uid: int
    action: str


class FormatNotAllowed(Denied):
    """The image was found to be of a format that the policy does not let this caller read."""

    sentence = "{path}: the policy does not allow the format {format} here"
    path: str
    format: str


class ClaimNotAllowed(Denied):
    """`is_zero` was claimed of a device, and the policy's root does not allow the claim."""

    sentence = "{path}: the policy does not allow you to claim that the device reads as zeroes"
    path: str


class DamageNotAllowed(Denied):
    """A damaged image was to be accepted, and the policy's root does not allow that."""

    sentence = "{path}: is damaged, and the policy does not allow you to accept that: {problem}"
    path: str
    problem: str


class Invalid(base.ConvertError):
    """The request can't be meant: no state of the system would make it right."""

    status = base.Status.INVALID_ARGUMENT


class BadPath(Invalid):
    """A path that is not absolute, or has `..`, a NUL or an empty name in it."""

    sentence = "{field}: {path!r} {problem}"
    field: str
    path: str
    problem: str


class BadFormat(Invalid):
    """A format that convertd does not know, or can't write."""

    sentence = "{field}: the format {format!r} can't be used here"
    field: str
    format: str


class BadOption(Invalid):
    """An option that has no such value, or does not go with another one."""

    sentence = "{field}: {problem}"
    field: str
    problem: str


class SecretMissing(Invalid):
    """An encrypted image, and no passphrase for it."""

    sentence = "{path}: the image is encrypted; give its passphrase"
    path: str


class SizeNotPossible(Invalid):
    """The destination's format, with the options asked for, has no images of the source's size."""

    sentence = (
        "{path}: the format {format} can't hold {size_bytes} bytes with these options;"
        " it holds {least_bytes} to {most_bytes} bytes"
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


class NotFound(base.ConvertError):
    """Allowed, but not there."""

    status = base.Status.NOT_FOUND


class SourceNotFound(NotFound):
    """There is no file of that name."""

    sentence = "{path}: no such file"
    path: str


class DirectoryNotFound(NotFound):
    """The destination's directory, or the root, is not there."""

    sentence = "{path}: the directory does not exist"
    path: str


class JobNotFound(NotFound):
    """No such job, or another user's: the answer is the same."""

    sentence = "you have no job {job_id!r}"
    job_id: str


class AlreadyExists(base.ConvertError):
    """There is something already."""

    status = base.Status.ALREADY_EXISTS


class DestExists(AlreadyExists):
    """The destination exists, and overwriting was not asked for."""

    sentence = "{path}: exists; ask to overwrite it, or choose another name"
    path: str
