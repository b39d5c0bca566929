"""Put a finished result over the file that has its name, without losing other data. Fails closed.

Between a check and rename(2) another process could put a file at the name, which would be lost. So
the two names are exchanged, in one step; then the inode that came out is judged, and exchanged back
if it may not be replaced. At every instant both files have a name.

- After a kill between the exchange and the judgement the result is in place, and what it replaced
  is there under a temporary name. The next sweep removes it only if it is the very inode that had
  been judged before (temporaries.py).
- A file that takes the destination's name between the two exchanges gets the temporary name, and
  the name goes back to the file that had it. That is logged, and the file in between is kept.
  A file of the caller's own does not get its name back from another user's: in a sticky directory
  the caller could so take a name from any user. It is kept under a name that no sweep removes.

A file system that can't exchange (NFS, most of FUSE; vfat before Linux 6.0) gets rename(2); and
where the policy lets a caller replace its own files only, this only in a directory in which no user
except root and the caller can put a file.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, values
from convertd_daemon.job.files import (
    attributes,
    credentials,
    paths,
    temporaries,
)
from convertd_daemon.linux.renameat2 import Flag, renameat2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.job.files.new_file import NewFile

log = logging.getLogger(__name__)

ATTEMPTS: Final = 64
"""How often a name that other processes keep changing is tried."""

CANT_EXCHANGE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""What renameat2(2) says where the file system does not know RENAME_EXCHANGE."""

CANT_LINK: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""What linkat(2) says where the file system has no hard links. Source: link(2)."""


def check_possible(grant: values.ConvertGrant, target: paths.Target, temporary: str) -> None:
    """Find out whether a file can be replaced safely, before anything is converted.

    `temporary` is the result's own name, of a file system that may not know how to exchange it.

    Raises:
        conditions.Unsupported: it could be another file by the time it is replaced.
        OSError: the kernel refuses.
    """
    if grant.overwrite is values.OverwriteScope.ANY or not _others_may_write(target, grant.peer):
        return
    here, other = target.directory, temporaries.new_name()
    os.close(
        os.open(other, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=here)
    )
    try:
        # Twice, so that each file has its own name again.
        renameat2(here, other, temporary, Flag.EXCHANGE)
        renameat2(here, other, temporary, Flag.EXCHANGE)
    except OSError as error:
        if error.errno not in CANT_EXCHANGE:
            raise
        raise _not_safe(target) from error
    finally:
        os.unlink(other, dir_fd=here)


def take_name(grant: values.ConvertGrant, dest: NewFile) -> bool:
    """Make the destination's name lead to the result; True if another file had it.

    Raises:
        FileExistsError: something has the name, and overwriting was not asked for.
        conditions.DestExists, conditions.NotYours, conditions.ImageInUse,
            conditions.ProtectedByAttribute: what has the name may not be replaced, and keeps it.
        conditions.NameReplaced: it comes and goes all the time.
        conditions.Unsupported: the file system can't do it safely.
        conditions.WriteFailed: what may not be replaced could not be given its name back, and the
            message has the new one.
        OSError: the kernel refuses.
    """
    target = dest.target
    try:
        with credentials.acting_for(dest.place.root, grant.peer):
            _link(dest)
    except FileExistsError:
        if not grant.request.dest.overwrite:
            raise
    else:
        return False
    with _held(grant, dest) as held:
        for _ in range(ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                _judge(grant, target, target.name)
                _put_over(grant, dest, held)
                return True
            # Nothing has the name any more.
            with (
                contextlib.suppress(FileExistsError),
                credentials.acting_for(dest.place.root, grant.peer),
            ):
                _move(target, held)
                return False
    raise conditions.NameReplaced(path=dest.place.path)


def _link(dest: NewFile) -> None:
    """Give the result the destination's name.

    Raises:
        FileExistsError: something has the name.
        conditions.Unsupported: the file system can give no name without replacing what has it.
        OSError: the kernel refuses.
    """
    target = dest.target
    if dest.temporary:
        _move(target, dest.temporary)
        return
    # Only with a dst_dir_fd does Python call linkat(2) with AT_SYMLINK_FOLLOW, which is what leads
    # from /proc/self/fd/N to the inode; otherwise it calls link(2), which links the symlink.
    path = f"/proc/self/fd/{dest.fd}"
    os.link(path, target.name, dst_dir_fd=target.directory, follow_symlinks=True)


def _move(target: paths.Target, name: str) -> None:
    """Rename a temporary to the destination's name, if nothing has that. As _link."""
    here = target.directory
    try:
        renameat2(here, name, target.name, Flag.NOREPLACE)
    except OSError as error:
        if error.errno not in CANT_EXCHANGE:
            raise
    else:
        return
    try:
        os.link(name, target.name, src_dir_fd=here, dst_dir_fd=here, follow_symlinks=False)
    except OSError as error:
        if error.errno not in CANT_LINK:
            raise
        why = "its file system has no hard links, nor a rename that replaces nothing"
        raise conditions.Unsupported(what=target.place.path, why=why) from error
    os.unlink(name, dir_fd=here)


def _put_over(grant: values.ConvertGrant, dest: NewFile, held: str) -> None:
    """Exchange, judge, and exchange back what may not be replaced.

    Raises:
        FileNotFoundError: nothing has the name any more.
    """
    target = dest.target
    try:
        with credentials.acting_for(dest.place.root, grant.peer):
            renameat2(target.directory, held, target.name, Flag.EXCHANGE)
    except OSError as error:
        if error.errno not in CANT_EXCHANGE:
            raise
        _rename(grant, dest, held)
        return
    try:
        _judge(grant, target, held)
    except FileNotFoundError:
        # It was removed under its new name: there is nothing to give back.
        return
    except (conditions.ConvertError, OSError):
        _give_back(grant, dest, held)
        raise
    try:
        with credentials.acting_for(dest.place.root, grant.peer):
            os.unlink(held, dir_fd=target.directory)
    except OSError as error:
        # The result is in place: what it replaced goes with the next sweep.
        log.warning("can't remove the replaced file name=%s error=%s", held, error)


def _rename(grant: values.ConvertGrant, dest: NewFile, held: str) -> None:
    """Rename over what was just judged, if no other user can replace it, or if any file may go."""
    target = dest.target
    if grant.overwrite is values.OverwriteScope.OWN and _others_may_write(target, grant.peer):
        raise _not_safe(target)
    with credentials.acting_for(dest.place.root, grant.peer):
        here = target.directory
        os.rename(held, target.name, src_dir_fd=here, dst_dir_fd=here)


def _not_safe(target: paths.Target) -> conditions.Unsupported:
    why = "its file system can't exchange two names, and others may write in its directory"
    return conditions.Unsupported(what=f"overwriting {target.place.path}", why=why)


@contextlib.contextmanager
def _held(grant: values.ConvertGrant, dest: NewFile) -> Iterator[str]:
    """Give the result a name that can be exchanged; take it away if it still leads to the result.

    One for all attempts: an inode that was made with O_TMPFILE, was given a name and lost it can't
    be given another. Source: fs/namei.c, vfs_link(), I_LINKABLE.

    Raises:
        conditions.ConvertError: as _judge, before there is any such name.
    """
    here, result = dest.target.directory, os.fstat(dest.fd)
    try:
        old = _judge(grant, dest.target, dest.target.name)
    except FileNotFoundError:
        old = 0
    directory = os.path.dirname(dest.place.path)
    attributes.check_directory(here, directory, renames=True)
    name = temporaries.new_name_to_exchange(result.st_ino, old)
    rights = functools.partial(credentials.acting_for, dest.place.root, grant.peer)
    temporaries.sweep(here, result.st_uid, rights)
    with rights():
        if dest.temporary:
            os.rename(dest.temporary, name, src_dir_fd=here, dst_dir_fd=here)
        else:
            path = f"/proc/self/fd/{dest.fd}"
            os.link(path, name, dst_dir_fd=here, follow_symlinks=True)
    try:
        yield name
    finally:
        if _is_result(dest, name):
            with credentials.acting_for(dest.place.root, grant.peer), contextlib.suppress(OSError):
                os.unlink(name, dir_fd=here)


def _judge(grant: values.ConvertGrant, target: paths.Target, name: str) -> int:
    """Give the inode number of the file at a name, if the grant lets it be replaced.

    Raises:
        FileNotFoundError: there is none.
        conditions.DestExists, conditions.NotYours, conditions.ImageInUse,
            conditions.ProtectedByAttribute: it may not.
    """
    fd = paths.look_up(target.directory, name)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise conditions.DestExists(path=target.place.path)
        if grant.overwrite is values.OverwriteScope.OWN and status.st_uid != grant.peer.uid:
            raise conditions.NotYours(path=target.place.path)
        attributes.check_file(fd, target.place.path)
        paths.check_unlocked(fd, target.place)
    finally:
        os.close(fd)
    return status.st_ino


def _give_back(grant: values.ConvertGrant, dest: NewFile, held: str) -> None:
    """Give the file at `held` the destination's name back, with the same rights as the exchange.

    Raises:
        conditions.WriteFailed: it can't be; its data is whole, and the message says where.
    """
    here, name = dest.target.directory, dest.target.name
    problem = "other processes keep taking its name"
    is_callers = _owner_of(here, held) == grant.peer.uid
    try:
        with credentials.acting_for(dest.place.root, grant.peer):
            for _ in range(ATTEMPTS):
                if not _is_given_back(here, held, name):
                    continue
                if _owner_of(here, held) is None or _is_result(dest, held):
                    return
                if not is_callers:
                    log.warning("kept a file that took the name in between name=%s", held)
                    return
                renameat2(here, held, name, Flag.EXCHANGE)
                problem = "another file has its name now"
                break
    except OSError as error:
        problem = os.strerror(error.errno or 0)
    kept = _kept(grant, dest, held)
    log.error("can't give a file its name back path=%r name=%s", dest.place.path, kept)
    problem = f"the file that was there is kept as {kept}: {problem}"
    raise conditions.WriteFailed(path=dest.place.path, problem=problem)


def _kept(grant: values.ConvertGrant, dest: NewFile, held: str) -> str:
    """Give the file at `held` a name that no sweep removes, if it can have one."""
    here, kept = dest.target.directory, temporaries.new_name_to_keep()
    try:
        with credentials.acting_for(dest.place.root, grant.peer):
            os.rename(held, kept, src_dir_fd=here, dst_dir_fd=here)
    except OSError:
        # An append-only directory, or a disk that has failed.
        return held
    return kept


def _is_given_back(directory: int, held: str, name: str) -> bool:
    """Try once; False if the name came or went meanwhile."""
    try:
        renameat2(directory, held, name, Flag.EXCHANGE)
    except FileNotFoundError:
        # The result was removed from the name, or the file from `held`: then nothing is left to do.
        try:
            renameat2(directory, held, name, Flag.NOREPLACE)
        except FileExistsError:
            return False
        except FileNotFoundError:
            return True
    return True


def _owner_of(directory: int, name: str) -> int | None:
    """Whose a file is; None if it can't be found."""
    try:
        return paths.status_of(directory, name).st_uid
    except OSError:
        return None


def _is_result(dest: NewFile, name: str) -> bool:
    """Whether a name in the directory leads to the result."""
    try:
        status = paths.status_of(dest.target.directory, name)
    except OSError:
        return False
    return os.path.samestat(status, os.fstat(dest.fd))


def _others_may_write(target: paths.Target, peer: values.Peer) -> bool:
    """Whether a user other than root and the caller could put a file at the name.

    The group's bits are also the mask of an access control list. Source: acl(5).
    """
    status = os.fstat(target.directory)
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return bool(others) or status.st_uid not in {0, peer.uid}
