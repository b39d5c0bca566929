"""Give the finished result its name: all of it, on disk, or none of it.

What holds, and what does not:

- Before the name appears, everything the result consists of is on disk (fsync of the descriptor
  that has been open since before the first write), with its owner and its mode.
- The name appears by linkat(2), which refuses a name that exists. To overwrite, the result is given
  a temporary name and rename(2) puts it over the old file: a reader sees the old one whole or the
  new one whole. A kill between the two leaves a complete temporary, which the next job that
  publishes by such a name in that directory removes.
- When `name` returns, the name too is on disk (fsync of the directory). If only that fails, the
  file is there and complete, and the caller is told so: PUBLISHED_BUT_NOT_DURABLE.
- After an error of any other kind nothing new is visible.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from convertd_daemon import errors, model
from convertd_daemon.job import devices, paths, rights, space
from convertd_daemon.job import result as results
from convertd_daemon.job.devices import DeviceDest

if TYPE_CHECKING:
    from convertd_daemon.job.result import FileDest


def flush(grant: model.Grant, plan: model.Plan, dest: FileDest | DeviceDest) -> None:
    """Put the result on disk: a file with the owner and mode that it keeps, but no name yet.

    Raises:
        errors.WriteFailed, errors.NoSpace, errors.QuotaExceeded: it could not be flushed.
    """
    if isinstance(dest, DeviceDest):
        devices.finish(dest, plan, is_zero=grant.request.dest.is_zero)
        return
    try:
        _dress(dest)
        os.fsync(dest.fd)
    except OSError as error:
        space.raise_if_full(error, dest.target)
        problem = os.strerror(error.errno or 0)
        raise errors.WriteFailed(path=dest.place.path, problem=problem) from error


def name(grant: model.Grant, dest: FileDest | DeviceDest) -> bool:
    """Give a flushed result the destination's name, and put that on disk too. A device has its own.

    Returns:
        Whether it took the place of an existing file.

    Raises:
        errors.DestExists, errors.NotYours: something has the name by now. Nothing is visible.
        errors.DirectoryNotFound: the directory has been removed. Nothing is visible.
        errors.AccessRefused: the kernel does not let the caller replace it. Nothing is visible.
        errors.WriteFailed, errors.NoSpace: the directory can't take it. Nothing is visible.
        errors.NameReplaced: the name leads to somebody else's file already.
        errors.PublishedButNotDurable: the result is in place; a crash may undo that.
    """
    if isinstance(dest, DeviceDest):
        return True
    path = dest.place.path
    try:
        with rights.of(dest.place.root, grant.peer):
            replaced = _take_name(grant, dest)
    except FileExistsError as error:
        raise errors.DestExists(path=path) from error
    except FileNotFoundError as error:
        # Removed meanwhile, and with it the place for a name.
        raise errors.DirectoryNotFound(path=os.path.dirname(path)) from error
    except PermissionError as error:
        # A sticky directory, most likely: what is there is another's, and stays.
        whose = rights.name_of(dest.place.root, grant.peer)
        raise errors.AccessRefused(path=path, rights=whose) from error
    except OSError as error:
        space.raise_if_full(error, dest.target)
        raise errors.WriteFailed(path=path, problem=os.strerror(error.errno or 0)) from error
    _check_name(dest)
    try:
        os.fsync(dest.target.directory)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise errors.PublishedButNotDurable(path=path, problem=problem) from error
    return replaced


def _dress(dest: FileDest) -> None:
    """Give the inode the mode and the owner that it keeps."""
    os.fchmod(dest.fd, dest.ownership.mode)
    status = os.fstat(dest.fd)
    wanted = (dest.ownership.uid, dest.ownership.gid)
    if wanted not in {(status.st_uid, status.st_gid), (status.st_uid, -1)}:
        os.fchown(dest.fd, *wanted)


def _take_name(grant: model.Grant, dest: FileDest) -> bool:
    """Make the name lead to the result; True if it was another file's before."""
    try:
        _link(dest, dest.target.name)
    except FileExistsError:
        if not grant.request.dest.overwrite:
            raise
    else:
        if dest.temporary:
            os.unlink(dest.temporary, dir_fd=dest.target.directory)
        return False
    temporary = dest.temporary or results.temporary_name()
    if not dest.temporary:
        results.sweep(dest.target)
        _link(dest, temporary)
    try:
        _check_replaceable(grant, dest)
        os.rename(
            temporary,
            dest.target.name,
            src_dir_fd=dest.target.directory,
            dst_dir_fd=dest.target.directory,
        )
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=dest.target.directory)
        raise
    return True


def _link(dest: FileDest, name: str) -> None:
    """Give the result one more name. Raises FileExistsError if something has it."""
    here = dest.target.directory
    if dest.temporary:
        os.link(dest.temporary, name, src_dir_fd=here, dst_dir_fd=here, follow_symlinks=False)
        return
    # Only with a dst_dir_fd does Python call linkat(2) with AT_SYMLINK_FOLLOW, which is what leads
    # from /proc/self/fd/N to the inode; otherwise it calls link(2), which links the symlink.
    os.link(f"/proc/self/fd/{dest.fd}", name, dst_dir_fd=here, follow_symlinks=True)


def _check_replaceable(grant: model.Grant, dest: FileDest) -> None:
    """Look once more at what rename(2) is about to replace."""
    with contextlib.suppress(FileNotFoundError):
        status = paths.status_of(dest.target.directory, dest.target.name)
        if not stat.S_ISREG(status.st_mode):
            raise errors.DestExists(path=dest.place.path)
        if grant.overwrite is model.Overwrite.OWN and status.st_uid != grant.peer.uid:
            raise errors.NotYours(path=dest.place.path)


def _check_name(dest: FileDest) -> None:
    """Make sure that the name leads to what we wrote, and to nobody else's file."""
    ours = os.fstat(dest.fd)
    try:
        theirs = paths.status_of(dest.target.directory, dest.target.name)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.EXDEV}:
            problem = os.strerror(error.errno or 0)
            raise errors.PublishedButNotDurable(path=dest.place.path, problem=problem) from error
        raise errors.NameReplaced(path=dest.place.path) from error
    if not os.path.samestat(ours, theirs):
        raise errors.NameReplaced(path=dest.place.path)
