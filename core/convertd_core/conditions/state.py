"""Conditions of the image, the destination or the policy's roots that prevent a conversion."""

from __future__ import annotations

from convertd_core.conditions import base


class AccessRefused(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """The kernel refused: the rights in force (see `access` of the root) do not suffice."""

    sentence = "{path}: the kernel refused access with the rights of {rights}"
    path: str
    rights: str


class SymlinkInPath(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """A symbolic link where none is followed."""

    sentence = "{path}: the path has a symbolic link, which is not followed"
    path: str


class OutsideRoot(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """The path leads out of its root: over a mount point, a link, or into another root."""

    sentence = "{path}: the path leaves the root {root}"
    path: str
    root: str


class RootUnusable(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """The root that contains the path can't be opened, or must not be."""

    sentence = "the root {root} can't be used: {problem}"
    root: str
    problem: str


class NotAnImage(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """Not a regular file in a root of files, not a block device in a root of devices."""

    sentence = "{path}: is {found}, not {wanted}"
    path: str
    found: str
    wanted: str


class ReadOnlyFileSystem(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """Nothing can be created there."""

    sentence = "{path}: the file system is read-only"
    path: str


class ProtectedByAttribute(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """chattr(1) keeps a directory or a file as it is, even from root."""

    sentence = "{path}: is {attribute} (see chattr(1)), so the result can't be placed there"
    path: str
    attribute: str


class OwnerNotKept(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """The destination's file system has no owners or modes, or others than were asked for."""

    sentence = "{path}: the file system sets {found} instead of {wanted}"
    path: str
    found: str
    wanted: str


class NotYours(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """The policy lets a caller overwrite its own files only."""

    sentence = "{path}: belongs to another user; the policy lets you overwrite only your own files"
    path: str


class ImageAtFault(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """The image itself is not what it should be: another state of the rest would not help."""


class ImageRefused(ImageAtFault):
    """An image that qemu-img can't read as what it should be, or that asks for more than itself.

    qemu-img's own message is in the daemon's log only: it can tell which files exist.
    """

    sentence = "{path}: the image is refused: {problem}"
    path: str
    problem: str


class FormatMismatch(ImageAtFault):
    """The image has another format than the caller stated."""

    sentence = "{path}: the image does not have the format {format}"
    path: str
    format: str


class AmbiguousFormat(ImageAtFault):
    """No format was stated, and the bytes fit a disk as well as something else.

    Read as the wrong one, it would silently become a useless disk. If stated, it is read.
    """

    sentence = "{path}: looks like {found}; {remedy}"
    path: str
    found: str
    remedy: str


class BackingRefused(ImageAtFault):
    """An image whose backing file this caller may not read, or which can't be read."""

    sentence = "{path}: its backing file {backing!r} is refused: {problem}"
    path: str
    backing: str
    problem: str


class ImageDamaged(ImageAtFault):
    """An image that is damaged, with all its data in place: it can be converted if that is asked.

    What has to be asked is `accept_damaged` of the source.
    """

    sentence = "{path}: is damaged, but its data is there: {problem}; accept this to convert it"
    path: str
    problem: str


class WrongSecret(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """The passphrase does not open the image."""

    sentence = "{path}: the passphrase does not open the image"
    path: str


class DeviceTooSmall(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """The image does not fit on the device. Nothing was written."""

    sentence = "{path}: has {size_bytes} bytes, the image needs {needed_bytes}"
    path: str
    size_bytes: int
    needed_bytes: int


class NoDirectWrites(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """A cache mode was asked for that the destination's file system does not do."""

    sentence = "{path}: cache mode {mode} needs direct writes, which do not work here: {problem}"
    path: str
    mode: str
    problem: str


class ReflinkNotPossible(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """The result was to share the source's blocks, and can't. Nothing was written."""

    sentence = "{path}: blocks can't be shared: {problem}"
    path: str
    problem: str


class DeviceNotWritable(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """The device's mode does not let its group write, and qemu-img has no other right to it."""

    sentence = "{path}: the group {group} of the device may not write to it (mode {mode})"
    path: str
    group: int
    mode: str


class ImageTooLarge(ImageAtFault):
    """More virtual size than the policy allows, or than the destination holds."""

    sentence = (
        "{path}: the virtual size {size_bytes} bytes exceeds the limit of {limit_bytes} bytes"
    )
    path: str
    size_bytes: int
    limit_bytes: int


class ImageInUse(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """Another process (a running qemu, most likely) has locked the image."""

    sentence = "{path}: another process uses the image"
    path: str


class ConversionFailed(base.ConvertError, status=base.Status.FAILED_PRECONDITION):
    """qemu-img gave up for a reason that is none of those above."""

    sentence = "{path}: qemu-img failed: {problem}"
    path: str
    problem: str
