"""The file that is being written, before it has a name.

An inode opened with O_TMPFILE is in no directory: no user can see it half-written, and the kernel
frees it when its last descriptor closes, however that comes about. Where a file system has no
O_TMPFILE (NFS, FUSE) a named temporary stands in, locked with flock(2) for as long as its job
lives. The next job that makes one there for the same owner removes those that are not locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from convertd_core import conditions, results, values
from convertd_daemon.job import stages
from convertd_daemon.job.files import (
    acl,
    attributes,
    credentials,
    direct_io,
    name_alias,
    ownership,
    paths,
    publish,
    replace,
    space,
    temporaries,
    write_behind,
    write_trial,
)
from convertd_daemon.job.files.new_file import NewFile
from convertd_daemon.job.qemu import execution
from convertd_daemon.sandbox import landlock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.job.files.paths import Target
    from convertd_daemon.sandbox.identity import Identity
    from convertd_daemon.sandbox.setup import Setup

log = logging.getLogger(__name__)

WITHOUT_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOSYS, errno.EINVAL})
"""What open(2) says of O_TMPFILE where kernel or file system lacks it."""

SCRATCH_MODE: Final = 0o040
"""The mode of a file of the job's own. qemu-img may read it, by its group."""

ATTEMPTS: Final = 8
"""How often a temporary is made again because a sweep removed it before it was locked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDest(NewFile):
    """A new file as the destination. See destination.Destination."""

    alias: str = ""
    expected_warnings: tuple[results.Warning, ...] = ()

    @property
    def on_device(self) -> bool:
        """A file has a length of its own."""
        return False

    @property
    def undefined_on_failure(self) -> str:
        """Nothing: a file that fails never appears."""
        return ""

    def inodes(self) -> execution.Inodes:
        """The inode alone."""
        return execution.Inodes(write=(self.fd,))

    def rules(self) -> tuple[landlock.Rule, ...]:
        """Write the inode, give it a name, and remove the alias."""
        return (
            landlock.Rule(where=self.fd, access=landlock.WRITE),
            landlock.Rule(where=self.target.directory, access=landlock.PUBLISH_IN),
            *((name_alias.rule(self.alias),) if self.alias else ()),
        )

    def direct_refusal(self) -> str | None:
        """Ask the kernel by writing to the inode, which is empty."""
        with publish.write_errors(self):
            return direct_io.write_refusal(self.fd)

    def write_rates(
        self, grant: values.ConvertGrant, plan: stages.ConversionPlan, /
    ) -> stages.WriteRates | None:
        """Write a little to the inode, which is empty, in both ways."""
        if not write_trial.is_worth_it(grant, plan, self.fd):
            return None
        with publish.write_errors(self):
            return write_trial.write_rates(self.fd)

    def available_bytes(self) -> int:
        """What an unprivileged user could still write there."""
        return space.free_bytes(self.target)

    def check_room(self, plan: stages.ConversionPlan, _source: int, /) -> None:
        """Hold what the plan expects against what the file system has."""
        space.check(self.target, plan.needed_bytes)

    def no_space(self, needed_bytes: int, /) -> conditions.ConvertError:
        """The file system got full of this very result."""
        return space.ran_out(self.target, self.fd, needed_bytes)

    def flush(self, plan: stages.ConversionPlan, /) -> tuple[results.Warning, ...]:
        """Set owner and mode, then fsync. What is on disk need not stay in the page cache."""
        warnings = publish.flush(self)
        if plan.write_behind:
            write_behind.drop(self.fd)
        return warnings

    def assign_name(self, grant: values.ConvertGrant, /) -> bool:
        """Give it the destination's name, and put that on disk too."""
        return publish.assign_name(grant, self)


@contextlib.contextmanager
def open_dest(grant: values.ConvertGrant, setup: Setup) -> Iterator[FileDest]:
    """Open the directory that a place names, and create the file that will appear in it.

    Raises:
        conditions.ConvertError: as paths.open_target and create.
    """
    with paths.open_target(grant) as target, create(grant, target, setup) as dest:
        yield dest


@contextlib.contextmanager
def create(grant: values.ConvertGrant, target: Target, setup: Setup) -> Iterator[FileDest]:
    """Make the inode in the directory where it will be published, so that the worker can write it.

    When the block is left the inode goes, unless it was given a name.

    Raises:
        conditions.AccessRefused, conditions.ReadOnlyFileSystem, conditions.NoSpace,
        conditions.QuotaExceeded, conditions.BadOption, conditions.OwnerNotKept,
            conditions.ProtectedByAttribute, conditions.Unsupported,
        conditions.WriteFailed: as they say.
    """
    with contextlib.ExitStack() as stack:
        path, expected = "", tuple[results.Warning, ...]()
        try:
            final = ownership.wanted(grant, target)
            with credentials.acting_for(target.place.root, grant.peer):
                fd, temporary = _open_new(target)
            stack.callback(os.close, fd)
            if temporary:
                stack.callback(_unlink, grant, target, temporary, fd)
            if setup.identity is not None:
                expected = ownership.open_to(setup.identity, fd, final, target)
            if temporary:
                rights = functools.partial(credentials.acting_for, target.place.root, grant.peer)
                temporaries.sweep(target.directory, os.fstat(fd).st_uid, rights)
                if target.existing:
                    with rights():
                        replace.check_possible(grant, target, temporary)
            if grant.request.dest.format in name_alias.FORMATS_THAT_NAME_THEMSELVES:
                path = stack.enter_context(name_alias.create(setup.names, target.name, fd))
        except OSError as error:
            _raise_for(error, grant, target)
        yield FileDest(
            target=target,
            fd=fd,
            temporary=temporary,
            ownership=final,
            alias=path,
            expected_warnings=expected,
        )


def open_scratch(
    grant: values.ConvertGrant, dest: NewFile, reader: Identity | None, stack: contextlib.ExitStack
) -> int:
    """Make a file of the job's own beside the result, in the same file system; empty.

    With a `reader`, who may read it, it is root's, so that it is on nobody's quota. It has no name,
    and goes when `stack` closes the descriptor.

    Raises:
        OSError: it can't be made, or keeps a name.
    """
    target = dest.target
    with credentials.acting_for(target.place.root, grant.peer):
        fd, temporary = _open_new(target)
        stack.callback(os.close, fd)
        if temporary:
            # Now, while it is the caller's: what is root's, no sweep for the caller takes away, and
            # in a sticky directory the caller's rights don't.
            os.unlink(temporary, dir_fd=target.directory)
    if reader is not None:
        # A list that it inherited would let others read it.
        acl.remove(fd)
        os.fchown(fd, os.geteuid(), reader.gid)
        os.fchmod(fd, SCRATCH_MODE)
    return fd


def _open_new(target: Target) -> tuple[int, str]:
    """Open a new inode, locked: a sweep of the directory skips locked files."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE
    try:
        fd = os.open(".", flags, 0o600, dir_fd=target.directory)
    except OSError as error:
        if error.errno not in WITHOUT_TMPFILE:
            raise
    else:
        return _locked(fd), ""
    return _open_named(target)


def _open_named(target: Target) -> tuple[int, str]:
    directory = os.path.dirname(target.place.path)
    # Make no name that could not be removed again.
    attributes.check_directory(target.directory, directory, renames=True)
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    for _ in range(ATTEMPTS):
        name = temporaries.new_name()
        fd = os.open(name, flags, 0o600, dir_fd=target.directory)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            if os.path.samestat(os.fstat(_locked(fd)), paths.status_of(target.directory, name)):
                return fd, name
        # A sweep removed it before it was locked.
        os.close(fd)
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _locked(fd: int) -> int:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _unlink(grant: values.ConvertGrant, target: Target, name: str, fd: int) -> None:
    """Remove a named temporary, unless publishing already has, and the name is another's.

    One that can't be removed is left to the next sweep: its owner has closed the directory, or
    mounted something over it, and the job's outcome is another.
    """
    try:
        if os.path.samestat(paths.status_of(target.directory, name), os.fstat(fd)):
            with credentials.acting_for(target.place.root, grant.peer):
                os.unlink(name, dir_fd=target.directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning(
            "can't remove a temporary path=%r name=%s error=%s", target.place.path, name, error
        )


def _raise_for(error: OSError, grant: values.ConvertGrant, target: Target) -> NoReturn:
    path = target.place.path
    space.raise_if_full(error, target)
    match error.errno:
        case errno.EACCES | errno.EPERM:
            whose = credentials.describe_rights(target.place.root, grant.peer)
            raise conditions.AccessRefused(path=path, rights=whose) from error
        case errno.EROFS:
            raise conditions.ReadOnlyFileSystem(path=path) from error
    raise conditions.WriteFailed(path=path, problem=os.strerror(error.errno or 0)) from error
