"""What must be there before the daemon serves requests. Fails closed, with one clear sentence."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import resource
import stat
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import children, landlock
from convertd_daemon.policy import path_walk, writers
from convertd_daemon.sandbox.identity import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_core import values

FRONT_USER: Final = "convertd"
WORKER_USER: Final = "convertd-qemu"

DESCRIPTORS_PER_CONNECTION: Final = 3
"""In the front: the peer's, and both ends of the way to gRPC."""
OWN_DESCRIPTORS: Final = 512

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

PROTECTED_HARDLINKS: Final = "/proc/sys/fs/protected_hardlinks"


class StartError(Exception):
    """Why the daemon does not start, in one sentence."""


def user(name: str) -> Identity:
    """Find one of the two users that the daemon's processes run as.

    Raises:
        StartError: there is none, or it is root.
    """
    try:
        entry = pwd.getpwnam(name)
        return Identity(uid=entry.pw_uid, gid=entry.pw_gid)
    except KeyError as error:
        group = f"--gid {name}" if _is_group(name) else "--user-group"
        how = f"useradd --system {group} --no-create-home --shell /usr/sbin/nologin {name}"
        raise StartError(f"there is no user {name}; make it with: {how}") from error
    except ValueError as error:
        raise StartError(f"the user {name} must not be root: {error}") from error


def _is_group(name: str) -> bool:
    """Whether useradd would find that the user's own group is there already."""
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def check_kernel() -> int:
    """Check what the kernel must provide, and return its Landlock ABI.

    Raises:
        StartError: Landlock is missing or off, hard links to others' files are allowed, or
            processes that a job leaves can't be found.
    """
    if os.geteuid() != 0:
        raise StartError("the daemon must be started as root; see docs/operations.md")
    with open(PROTECTED_HARDLINKS, encoding="ascii") as setting:
        protected = setting.read().strip()
    if protected != "1":
        how = "sysctl -w fs.protected_hardlinks=1"
        raise StartError(f"fs.protected_hardlinks is off; turn it on with: {how}")
    try:
        children.of_self()
    except OSError as error:
        raise StartError("this kernel lists no children (CONFIG_PROC_CHILDREN)") from error
    abi = landlock.abi()
    if abi < 1:
        raise StartError(
            "this kernel has no Landlock, or has it off: it takes Linux 5.13 and landlock in lsm="
        )
    return abi


def check_descriptors(limits: values.Limits) -> None:
    """Check that as many connections as the policy allows can be open, in the front too.

    Raises:
        StartError: the hard limit on descriptors is too low for them.
    """
    needed = limits.connections * DESCRIPTORS_PER_CONNECTION + OWN_DESCRIPTORS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < needed:
        raise StartError(
            f"{limits.connections} connections take {needed} descriptors, the hard limit is {hard}:"
            " raise it (LimitNOFILE=), or lower connections in the policy's limits"
        )


def check_program(path: str) -> None:
    """Check that there is a qemu-img, and that only root can change or replace it.

    Links are followed, and each directory that they lead through counts.

    Raises:
        StartError: there is none, or others could.
    """
    try:
        with contextlib.ExitStack() as stack:
            program = None
            for above, program in path_walk.followed(path, stack):
                if others := writers.of(above, program.status.st_uid):
                    raise StartError(f"{path}: {others}, who could so replace it")
            if program is None or not _is_roots_program(program):
                raise StartError(f"{path}: is not a program that only root can write")
    except OSError as error:
        raise StartError(f"{path}: {os.strerror(error.errno or 0)} (package qemu-utils)") from error


def _is_roots_program(found: path_walk.Step) -> bool:
    return stat.S_ISREG(found.status.st_mode) and not writers.of(found)


def private_directory(socket_path: str, front: Identity) -> str:
    """Make the directory that only the front can enter, next to the public socket.

    Raises:
        StartError: something else has that name.
    """
    return _fresh_directory(f"{socket_path}.private", front, 0o700)


def names_directory(socket_path: str) -> str:
    """Make the directory for the links of jobs: every user may pass through it, and not list it.

    Raises:
        StartError: something else has that name.
    """
    return _fresh_directory(f"{socket_path}.names", None, 0o711)


def _fresh_directory(path: str, owner: Identity | None, mode: int) -> str:
    uid, gid = (owner.uid, owner.gid) if owner else (0, 0)
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        pass
    except OSError as error:
        raise StartError(f"can't make {path}: {os.strerror(error.errno or 0)}") from error
    with _opened(path) as fd:
        if os.fstat(fd).st_uid not in {0, uid}:
            raise StartError(f"{path}: belongs to another user")
        _empty(fd)
        # A new one in any case: a daemon that is still stopping has the old one, see `kept`.
        os.rmdir(path)
    os.mkdir(path, mode)
    with _opened(path) as fd:
        os.fchmod(fd, mode)
        os.fchown(fd, uid, gid)
    return path


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """Open a directory, and no link to one."""
    fd = os.open(path, DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def kept(path: str) -> Iterator[None]:
    """Remove a directory of ours at the end, unless the next daemon has replaced it by its own."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield
    finally:
        # While it is open its inode number is not reused; without a link it is in no directory.
        if os.fstat(fd).st_nlink:
            remove_directory(path)
        os.close(fd)


def remove_directory(path: str) -> None:
    """Remove a directory of the daemon's. What can't be removed is removed by the next start."""
    with contextlib.suppress(OSError):
        with _opened(path) as fd:
            _empty(fd)
        os.rmdir(path)


def _empty(directory: int) -> None:
    """Remove what a daemon that was killed left: sockets, and directories with a link in each.

    By descriptors: an earlier front may still run, and the directory's owner may put a link in the
    place of a directory. What a link leads to must not be removed.
    """
    for name in os.listdir(directory):
        try:
            inner = os.open(name, DIRECTORY, dir_fd=directory)
        except NotADirectoryError:  # a link too, with O_NOFOLLOW. Source: open(2)
            os.unlink(name, dir_fd=directory)
            continue
        try:
            for link in os.listdir(inner):
                os.unlink(link, dir_fd=inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=directory)
