"""Give the finished result its name: all of it, on disk, or none of it.

What holds, and what does not:

- Before the name appears, everything the result consists of is on disk (fsync of the descriptor
  that has been open since before the first write), with its owner and its mode.
- The name appears by linkat(2), which refuses a name that exists. To overwrite, the result gets a
  temporary name, which is exchanged with the destination's: a reader sees the whole old file or the
  whole new one. A kill in between leaves one complete file under a temporary name, which the next
  job that overwrites there for the same owner removes. See replace.py.
- When `assign_name` returns, the name too is on disk (fsync of the directory). If only that fails,
  the file is there and complete, and the caller gets PUBLISHED_BUT_NOT_DURABLE.
- After any other error nothing new is visible.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from convertd_core import conditions, results, values
from convertd_daemon.job.files import (
    credentials,
    ownership,
    paths,
    replace,
    space,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.job.files.new_file import NewFile


@contextlib.contextmanager
def write_errors(file: NewFile) -> Iterator[None]:
    """Turn what the kernel says of writing the file into a condition.

    Raises:
        conditions.WriteFailed, conditions.NoSpace, conditions.QuotaExceeded: an OSError in the
            block.
    """
    try:
        yield
    except OSError as error:
        space.raise_if_full(error, file.target)
        problem = os.strerror(error.errno or 0)
        raise conditions.WriteFailed(path=file.place.path, problem=problem) from error


def flush(file: NewFile) -> tuple[results.Warning, ...]:
    """Put the file on disk with the owner and mode that it keeps, but no name yet.

    Gives a warning if its file system keeps other ones than it should have.

    Raises:
        conditions.OwnerNotKept: as that, and the root does not allow it.
        conditions.WriteFailed, conditions.NoSpace, conditions.QuotaExceeded: it could not be
            flushed.
    """
    with write_errors(file):
        warnings = ownership.settle(file.fd, file.ownership, file.target)
        os.fsync(file.fd)
    return warnings


def assign_name(grant: values.ConvertGrant, dest: NewFile) -> bool:
    """Give a flushed file the destination's name, and put that on disk too.

    Returns:
        Whether it took the place of an existing file.

    Raises:
        conditions.DestExists, conditions.NotYours, conditions.ImageInUse,
            conditions.ProtectedByAttribute: what has the name by now keeps it. Nothing is visible.
        conditions.Unsupported: it can't be replaced safely there. Nothing is visible.
        conditions.DirectoryNotFound: the directory has been removed. Nothing is visible.
        conditions.AccessRefused: the kernel does not let the caller replace it. Nothing is visible.
        conditions.WriteFailed, conditions.NoSpace: the directory can't take it. Nothing is visible.
        conditions.NameReplaced: the name leads to another file already.
        conditions.PublishedButNotDurable: the result is in place; a crash may undo that.
    """
    path = dest.place.path
    try:
        replaced = replace.take_name(grant, dest)
    except FileExistsError as error:
        raise conditions.DestExists(path=path) from error
    except FileNotFoundError as error:
        # The directory was removed meanwhile.
        raise conditions.DirectoryNotFound(path=os.path.dirname(path)) from error
    except BlockingIOError as error:
        # A process has a lease on it, which the kernel has to break first.
        raise conditions.ImageInUse(path=path) from error
    except PermissionError as error:
        # Most likely a sticky directory, and another user's file in it.
        whose = credentials.describe_rights(dest.place.root, grant.peer)
        raise conditions.AccessRefused(path=path, rights=whose) from error
    except OSError as error:
        space.raise_if_full(error, dest.target)
        raise conditions.WriteFailed(path=path, problem=os.strerror(error.errno or 0)) from error
    _check_name(dest)
    try:
        os.fsync(dest.target.directory)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise conditions.PublishedButNotDurable(path=path, problem=problem) from error
    return replaced


def _check_name(dest: NewFile) -> None:
    """Make sure that the name leads to the file that we wrote."""
    try:
        # On FUSE, an inode that was removed can't be asked either.
        ours = os.fstat(dest.fd)
        theirs = paths.status_of(dest.target.directory, dest.target.name)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.EXDEV}:
            problem = os.strerror(error.errno or 0)
            raise conditions.PublishedButNotDurable(
                path=dest.place.path, problem=problem
            ) from error
        raise conditions.NameReplaced(path=dest.place.path) from error
    if not os.path.samestat(ours, theirs):
        raise conditions.NameReplaced(path=dest.place.path)
