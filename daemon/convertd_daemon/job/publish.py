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
from convertd_daemon.job import result as results
from convertd_daemon.job import rights, space

if TYPE_CHECKING:
    from convertd_daemon.job.paths import Target
    from convertd_daemon.job.result import Result


def flush(target: Target, result: Result) -> None:
    """Put the result on disk with the owner and mode that it keeps. It has no name yet.

    Raises:
        errors.WriteFailed, errors.NoSpace, errors.QuotaExceeded: it could not be flushed.
    """
    try:
        _dress(result)
        os.fsync(result.fd)
    except OSError as error:
        space.raise_if_full(error, target)
        problem = os.strerror(error.errno or 0)
        raise errors.WriteFailed(path=target.place.path, problem=problem) from error


def name(grant: model.Grant, target: Target, result: Result) -> bool:
    """Give a flushed result the destination's name, and put that on disk too.

    Returns:
        Whether it took the place of an existing file.

    Raises:
        errors.DestExists, errors.NotYours: something has the name by now. Nothing is visible.
        errors.WriteFailed, errors.NoSpace: the directory can't take it. Nothing is visible.
        errors.NameReplaced: the name leads to somebody else's file already.
        errors.PublishedButNotDurable: the result is in place; a crash may undo that.
    """
    path = target.place.path
    try:
        with rights.of(target.place.root, grant.peer):
            replaced = _take_name(grant, target, result)
    except FileExistsError as error:
        raise errors.DestExists(path=path) from error
    except OSError as error:
        space.raise_if_full(error, target)
        raise errors.WriteFailed(path=path, problem=os.strerror(error.errno or 0)) from error
    _check_name(target, result)
    try:
        os.fsync(target.directory)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise errors.PublishedButNotDurable(path=path, problem=problem) from error
    return replaced


def _dress(result: Result) -> None:
    """Give the inode the mode and the owner that it keeps."""
    os.fchmod(result.fd, result.ownership.mode)
    status = os.fstat(result.fd)
    wanted = (result.ownership.uid, result.ownership.gid)
    if wanted not in {(status.st_uid, status.st_gid), (status.st_uid, -1)}:
        os.fchown(result.fd, *wanted)


def _take_name(grant: model.Grant, target: Target, result: Result) -> bool:
    """Make the name lead to the result; True if it was another file's before."""
    try:
        _link(target, result, target.name)
    except FileExistsError:
        if not grant.request.dest.overwrite:
            raise
    else:
        if result.temporary:
            os.unlink(result.temporary, dir_fd=target.directory)
        return False
    temporary = result.temporary or results.temporary_name()
    if not result.temporary:
        results.sweep(target)
        _link(target, result, temporary)
    try:
        _check_replaceable(grant, target)
        os.rename(temporary, target.name, src_dir_fd=target.directory, dst_dir_fd=target.directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=target.directory)
        raise
    return True


def _link(target: Target, result: Result, name: str) -> None:
    """Give the result one more name. Raises FileExistsError if something has it."""
    here = target.directory
    if result.temporary:
        os.link(result.temporary, name, src_dir_fd=here, dst_dir_fd=here, follow_symlinks=False)
        return
    # Only with a dst_dir_fd does Python call linkat(2) with AT_SYMLINK_FOLLOW, which is what leads
    # from /proc/self/fd/N to the inode; otherwise it calls link(2), which links the symlink.
    os.link(f"/proc/self/fd/{result.fd}", name, dst_dir_fd=here, follow_symlinks=True)


def _check_replaceable(grant: model.Grant, target: Target) -> None:
    """Look once more at what rename(2) is about to replace."""
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(target.name, dir_fd=target.directory, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            raise errors.DestExists(path=target.place.path)
        if grant.overwrite is model.Overwrite.OWN and status.st_uid != grant.peer.uid:
            raise errors.NotYours(path=target.place.path)


def _check_name(target: Target, result: Result) -> None:
    """Make sure that the name leads to what we wrote, and to nobody else's file."""
    ours = os.fstat(result.fd)
    try:
        theirs = os.stat(target.name, dir_fd=target.directory, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOENT:
            problem = os.strerror(error.errno or 0)
            raise errors.PublishedButNotDurable(path=target.place.path, problem=problem) from error
        raise errors.NameReplaced(path=target.place.path) from error
    if not os.path.samestat(ours, theirs):
        raise errors.NameReplaced(path=target.place.path)
