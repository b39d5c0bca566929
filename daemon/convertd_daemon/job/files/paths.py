"""From names to descriptors. After this module a path is never a string again.

Fails closed. Each name is resolved once, by openat2(2), and its inode is kept open: moving or
swapping files meanwhile has no effect. Each job resolves a root anew, from `/`: a descriptor of it
kept since the start would outlive an unmount or a swap of the root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from convertd_core import conditions, values
from convertd_daemon.job.files import (
    attributes,
    credentials,
    opened_source,
    roots,
    source_change,
)
from convertd_daemon.linux import locks
from convertd_daemon.linux.openat2 import AT_FDCWD, Resolve, openat2

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICES: Final = "/dev"

QEMU_LOCKS: Final = (100, 203)
"""The first and last byte on which qemu takes its image locks. Source: qemu block/file-posix.c."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the result will be: a directory, open for fsync(2), and a name in it.

    `existing` is what the name led to, if anything. `mount_table` lists the mounts, opened before
    Landlock closed /proc, so that a message can name one.
    """

    place: values.Place
    directory: int
    name: str
    existing: os.stat_result | None
    setgid_group: int | None
    mount_table: int


@contextlib.contextmanager
def open_source(place: values.Place, peer: values.Peer) -> Iterator[opened_source.Source]:
    """Open the image that a place names.

    Raises:
        conditions.SourceNotFound, conditions.AccessRefused, conditions.SymlinkInPath,
            conditions.OutsideRoot,
        conditions.RootUnusable, conditions.NotAnImage, conditions.ImageInUse,
            conditions.ReadFailed: as they say.
    """
    with contextlib.ExitStack() as stack:
        try:
            with credentials.acting_for(place.root, peer):
                fd = open_beneath(place, place.below)
                stack.callback(os.close, fd)
                check_kind(place, os.fstat(fd))
                # O_NONBLOCK: never wait for a FIFO's writer or a lease's holder.
                image = reopen(fd, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
                stack.callback(os.close, image)
                if place.root.kind is values.RootKind.BLOCK:
                    # Mounted, or held by a volume manager: what it holds is not at rest.
                    os.close(reopen(fd, os.O_RDONLY | os.O_NONBLOCK | os.O_EXCL))
            on_device = place.root.kind is values.RootKind.BLOCK
            opened = None if on_device else source_change.opened(image)
            size = os.lseek(image, 0, os.SEEK_END)
            allocated = size if on_device else os.fstat(image).st_blocks * 512
        except OSError as error:
            raise_for(error, place, peer, conditions.SourceNotFound(path=place.path))
        yield opened_source.Source(
            place=place,
            fd=image,
            size_bytes=size,
            allocated_bytes=allocated,
            opened=opened,
        )


@contextlib.contextmanager
def open_target(grant: values.ConvertGrant) -> Iterator[Target]:
    """Open the directory in which the result will appear, and see what has its name now.

    Raises:
        conditions.DirectoryNotFound, conditions.DestExists, conditions.NotYours,
            conditions.ImageInUse,
        conditions.ProtectedByAttribute, and what open_source raises: as they say.
    """
    place = grant.dest
    parent, name = posixpath.split(place.below)
    with contextlib.ExitStack() as stack:
        try:
            with credentials.acting_for(place.root, grant.peer):
                fd = open_beneath(place, parent, os.O_DIRECTORY)
                stack.callback(os.close, fd)
            # fsync(2) wants a directory open for reading; that takes nothing from its mode.
            directory = reopen(fd, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, directory)
            status = os.fstat(directory)
            existing = _existing(grant, directory, name)
            above = posixpath.dirname(place.path)
            attributes.check_directory(directory, above, renames=existing is not None)
        except OSError as error:
            path = posixpath.dirname(place.path)
            raise_for(error, place, grant.peer, conditions.DirectoryNotFound(path=path))
        mount_table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, mount_table)
        yield Target(
            place=place,
            directory=directory,
            name=name,
            existing=existing,
            setgid_group=status.st_gid if status.st_mode & stat.S_ISGID else None,
            mount_table=mount_table,
        )


def _existing(grant: values.ConvertGrant, directory: int, name: str) -> os.stat_result | None:
    """The file that has the result's name now, if it may be replaced."""
    place = grant.dest
    try:
        # With the rights in force: a caller that may not search the directory learns no name in it.
        with credentials.acting_for(place.root, grant.peer):
            fd = look_up(directory, name)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(fd)
        if stat.S_ISLNK(status.st_mode):
            raise conditions.SymlinkInPath(path=place.path)
        check_kind(place, status)
        if not grant.request.dest.overwrite:
            raise conditions.DestExists(path=place.path)
        if grant.overwrite is values.OverwriteScope.OWN and status.st_uid != grant.peer.uid:
            raise conditions.NotYours(path=place.path)
        attributes.check_file(fd, place.path)
        check_unlocked(fd, place)
    except FileNotFoundError:
        # Removed meanwhile: FUSE knows no inode that has no name.
        return None
    finally:
        os.close(fd)
    return status


def look_up(directory: int, name: str) -> int:
    """Open a name in a directory, with O_PATH: a link itself, and never a mount's root.

    A file can be a mount point too. A FUSE file system of its owner's may be mounted there, which
    can hold a process that only calls fstat(2) in state D.

    Raises:
        OSError: EXDEV, something is mounted there; or what the kernel says.
    """
    resolve = Resolve.BENEATH | Resolve.NO_MAGICLINKS | Resolve.NO_XDEV
    return openat2(directory, name, flags=os.O_PATH | os.O_NOFOLLOW, resolve=resolve)


def status_of(directory: int, name: str) -> os.stat_result:
    """What fstat(2) says of a name in a directory. A link is not followed, nor a mount entered.

    Raises:
        OSError: as look_up.
    """
    fd = look_up(directory, name)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def check_unlocked(fd: int, place: values.Place) -> None:
    """Refuse to replace the disk of a running qemu: its further writes would be lost.

    Raises:
        conditions.ImageInUse: a qemu has locked it.
        OSError: it can't be opened for reading.
    """
    file = reopen(fd, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if is_in_use(file):
            raise conditions.ImageInUse(path=place.path)
    finally:
        os.close(file)


def is_in_use(fd: int) -> bool:
    """Whether a qemu has the image open, for reading or writing."""
    return locks.is_locked(fd, *QEMU_LOCKS)


def open_beneath(place: values.Place, below: str, flags: int = 0) -> int:
    """Resolve a way below a root, and open what it leads to with O_PATH.

    Raises:
        OSError: the kernel refuses; EXDEV too if the way leads into another root.
        conditions.RootUnusable: the root can't be opened as it is, or must not be.
    """
    root = place.root
    if root.access is None:
        # The process has only its caller's rights: links are followed as by every other program.
        path = posixpath.join(root.path, below)
        return openat2(AT_FDCWD, path, flags=os.O_PATH | flags, resolve=Resolve.NO_MAGICLINKS)
    if root.kind is values.RootKind.BLOCK:
        # The names are udev's links, such as /dev/vg/lv to ../dm-0. That the name lies below the
        # root was seen when the root was chosen; the links may lead anywhere below /dev.
        roots.check_devices(root)
        return _open_device(posixpath.join(root.path, below), flags)
    return roots.open_beneath(place, below, flags)


def open_root(root: values.Root) -> int:
    """Open what has a root's name now, for Landlock, with O_PATH; /dev for a root of devices.

    It is not checked, for it may be on storage that does not answer. Every file in it is opened by
    open_beneath.

    Raises:
        OSError: it is not there, or a link is on the way.
    """
    return _open_directory(DEVICES if root.kind is values.RootKind.BLOCK else root.path)


def _open_device(path: str, flags: int) -> int:
    devices = _open_directory(DEVICES)
    try:
        return openat2(
            devices,
            posixpath.relpath(path, DEVICES),
            flags=os.O_PATH | flags,
            resolve=Resolve.BENEATH | Resolve.NO_MAGICLINKS,
        )
    finally:
        os.close(devices)


def _open_directory(path: str) -> int:
    strictly = Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS
    return openat2(AT_FDCWD, path, flags=os.O_PATH | os.O_DIRECTORY, resolve=strictly)


def reopen(fd: int, flags: int) -> int:
    """Open the inode that a descriptor leads to once more; the kernel checks its permissions.

    Raises:
        OSError: the kernel refuses.
    """
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def check_kind(place: values.Place, status: os.stat_result) -> None:
    """Check that a root of files gave a regular file, a root of devices a block device.

    Raises:
        conditions.NotAnImage: it is something else.
    """
    wanted = {
        values.RootKind.FILE: (stat.S_ISREG, "a regular file"),
        values.RootKind.BLOCK: (stat.S_ISBLK, "a block device"),
    }
    is_wanted, name = wanted[place.root.kind]
    if not is_wanted(status.st_mode):
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise conditions.NotAnImage(path=place.path, found=found, wanted=name)


_KINDS: Final = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def raise_for(
    error: OSError, place: values.Place, peer: values.Peer, absent: conditions.ConvertError
) -> NoReturn:
    """Say in the caller's terms why a place could not be opened.

    Raises:
        conditions.ConvertError: always.
    """
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            raise absent from error
        case errno.ELOOP:
            raise conditions.SymlinkInPath(path=place.path) from error
        case errno.EXDEV:
            raise conditions.OutsideRoot(path=place.path, root=place.root.path) from error
        case errno.EACCES | errno.EPERM:
            whose = credentials.describe_rights(place.root, peer)
            raise conditions.AccessRefused(path=place.path, rights=whose) from error
        case errno.EWOULDBLOCK | errno.ETXTBSY | errno.EBUSY:
            raise conditions.ImageInUse(path=place.path) from error
    raise conditions.ReadFailed(path=place.path, problem=os.strerror(error.errno or 0)) from error
