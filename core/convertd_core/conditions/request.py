"""Conditions of a request: not permitted, invalid, or about something that does not exist."""

from __future__ import annotations

from convertd_core.conditions import base


class UnknownConnection(base.ConvertError, status=base.Status.UNAUTHENTICATED):
    """The call came over a connection that the daemon did not accept, or that has ended."""

    sentence = "the daemon does not know who opened this connection"


class PermissionDenied(base.ConvertError, status=base.Status.PERMISSION_DENIED):
    """No rule allows this. Says the same whether or not the paths exist."""

    sentence = "the policy does not allow uid {uid} to {action}"
    uid: int
    action: str


class FormatNotAllowed(base.ConvertError, status=base.Status.PERMISSION_DENIED):
    """The image was found to be of a format that the policy does not let this caller read."""

    sentence = "{path}: the policy does not allow the format {format} here"
    path: str
    format: str


class ClaimNotAllowed(base.ConvertError, status=base.Status.PERMISSION_DENIED):
    """`is_zero` was claimed of a device, and the policy's root does not allow the claim."""

    sentence = "{path}: the policy does not allow you to claim that the device reads as zeroes"
    path: str


class DamageNotAllowed(base.ConvertError, status=base.Status.PERMISSION_DENIED):
    """A damaged image was to be accepted, and the policy's root does not allow that."""

    sentence = "{path}: is damaged, and the policy does not allow you to accept that: {problem}"
    path: str
    problem: str


class BadPath(base.ConvertError, status=base.Status.INVALID_ARGUMENT):
    """A path that is not absolute, or has `..`, a NUL or an empty name in it."""

    sentence = "{field}: {path!r} {problem}"
    field: str
    path: str
    problem: str


class BadFormat(base.ConvertError, status=base.Status.INVALID_ARGUMENT):
    """A format that convertd does not know, or can't write."""

    sentence = "{field}: the format {format!r} can't be used here"
    field: str
    format: str


class BadOption(base.ConvertError, status=base.Status.INVALID_ARGUMENT):
    """An option that has no such value, or does not go with another one."""

    sentence = "{field}: {problem}"
    field: str
    problem: str


class SecretMissing(base.ConvertError, status=base.Status.INVALID_ARGUMENT):
    """An encrypted image, and no passphrase for it."""

    sentence = "{path}: the image is encrypted; give its passphrase"
    path: str


class SizeNotPossible(base.ConvertError, status=base.Status.INVALID_ARGUMENT):
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


class BadMessage(base.ConvertError, status=base.Status.INVALID_ARGUMENT):
    """Bytes that are not a valid request."""

    sentence = "the request can't be read: {problem}"
    problem: str


class SourceNotFound(base.ConvertError, status=base.Status.NOT_FOUND):
    """There is no file of that name."""

    sentence = "{path}: no such file"
    path: str


class DirectoryNotFound(base.ConvertError, status=base.Status.NOT_FOUND):
    """The destination's directory, or the root, is not there."""

    sentence = "{path}: the directory does not exist"
    path: str


class JobNotFound(base.ConvertError, status=base.Status.NOT_FOUND):
    """No such job, or another user's: the answer is the same."""

    sentence = "you have no job {job_id!r}"
    job_id: str


class DestExists(base.ConvertError, status=base.Status.ALREADY_EXISTS):
    """The destination exists, and overwriting was not asked for."""

    sentence = "{path}: exists; ask to overwrite it, or choose another name"
    path: str
