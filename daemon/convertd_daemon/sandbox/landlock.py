"""Which files a process may touch, by Landlock. Fails closed: no Landlock, no process.

A ruleset always denies every right that the running kernel knows, and the rules give back what is
named. What a kernel does not know can't be denied by it; STAND_INS says what denies it instead.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from convertd_daemon.linux import landlock, prctl, unshare
from convertd_daemon.linux.landlock import AccessFs, AccessNet, Scope
from convertd_daemon.sandbox import errors

READ: Final = AccessFs.READ_FILE
WRITE: Final = AccessFs.READ_FILE | AccessFs.WRITE_FILE | AccessFs.TRUNCATE
DEVICE: Final = WRITE | AccessFs.IOCTL_DEV
EXECUTE: Final = AccessFs.READ_FILE | AccessFs.EXECUTE
READ_BENEATH: Final = AccessFs.READ_FILE | AccessFs.READ_DIR
PUBLISH_IN: Final = WRITE | AccessFs.READ_DIR | AccessFs.MAKE_REG | AccessFs.REMOVE_FILE
"""Open unnamed inodes in a directory, link, rename within it, unlink; list it for leftovers."""

_NO_FS: Final = AccessFs(0)
_NO_NET: Final = AccessNet(0)
_NO_SCOPE: Final = Scope(0)

# What path_beneath takes for an inode that is not a directory; anything else is EINVAL.
_OF_A_FILE: Final = DEVICE | AccessFs.EXECUTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one version of Landlock's ABI added."""

    abi: int
    kernel: str
    fs: AccessFs = _NO_FS
    net: AccessNet = _NO_NET
    scope: Scope = _NO_SCOPE


# Source: Documentation/userspace-api/landlock.rst. Versions 7 and 8 (logging, all threads at once)
# add no right.
GENERATIONS: Final = (
    Generation(abi=1, kernel="5.13", fs=AccessFs(AccessFs.REFER - 1)),
    Generation(abi=2, kernel="5.19", fs=AccessFs.REFER),
    Generation(abi=3, kernel="6.2", fs=AccessFs.TRUNCATE),
    Generation(abi=4, kernel="6.7", net=AccessNet.BIND_TCP | AccessNet.CONNECT_TCP),
    Generation(abi=5, kernel="6.10", fs=AccessFs.IOCTL_DEV),
    Generation(abi=6, kernel="6.12", scope=Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL),
)


def _and_before(before: Generation, added: Generation) -> Generation:
    return Generation(
        abi=added.abi,
        kernel=added.kernel,
        fs=before.fs | added.fs,
        net=before.net | added.net,
        scope=before.scope | added.scope,
    )


_UP_TO: Final = tuple(itertools.accumulate(GENERATIONS, _and_before))
"""All that each version denies."""

# Below the ABI, who denies it instead. Nothing stands in for ABI 1: we refuse to start.
STAND_INS: Final[Mapping[int, str]] = {
    2: "the kernel itself: before ABI 2 a Landlocked process can't link or rename across "
    "directories at all",
    3: "seccomp refuses truncate(2); open(2) with O_TRUNC needs WRITE_FILE anyway",
    4: "seccomp refuses every socket that is not AF_UNIX, and to qemu-img every socket",
    5: "only descriptors of the job's own inodes exist; seccomp refuses the ioctls that reach "
    "further than their descriptor",
    6: "an own uid, and seccomp refuses kill(2) and its kin, and to qemu-img every socket",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Leave to do something with one inode, and with all beneath it if it is a directory.

    `where` is a descriptor, borrowed until the ruleset is made, or an absolute path, which is
    followed like any other. A path that is absent is an error unless `optional`.
    """

    where: int | str
    access: AccessFs
    optional: bool = False


def ruleset(rules: Iterable[Rule], *, abi: int | None = None) -> int:
    """Make a ruleset that denies all but `rules`; the caller closes the descriptor.

    `abi` pretends that the kernel is older, for tests; it never makes it newer.

    Raises:
        LandlockMissing: this kernel has none.
        OSError: a rule's path can't be opened, or its inode can't be governed (a pipe, a memfd).
    """
    running = landlock.abi()
    known = running if abi is None else min(abi, running)
    if known < 1:
        raise errors.LandlockMissing
    denied = _UP_TO[min(known, len(_UP_TO)) - 1]
    made = landlock.create_ruleset(fs=denied.fs, net=denied.net, scope=denied.scope)
    try:
        for rule in rules:
            _add(made, rule, denied.fs)
    except BaseException:
        os.close(made)
        raise
    return made


def enforce(made: int) -> None:
    """Bind the calling process, for ever, to a ruleset from ruleset().

    Raises:
        OSError: as landlock_restrict_self(2); the process is then not bound.
        ValueError: there are several threads, of which only this one would be.
    """
    _refuse_threads()
    prctl.set_no_new_privs()
    landlock.restrict_self(made)


def restrict(rules: Iterable[Rule], *, abi: int | None = None) -> None:
    """Bind the calling process to `rules`: ruleset() and enforce().

    Raises:
        LandlockMissing: this kernel has none.
        OSError: a rule can't be made, or the ruleset not enforced.
        ValueError: as enforce().
    """
    made = ruleset(rules, abi=abi)
    try:
        enforce(made)
    finally:
        os.close(made)


def _refuse_threads() -> None:
    if not unshare.is_single_threaded():
        raise ValueError("can't confine a process that has several threads")


def _add(made: int, rule: Rule, denied: AccessFs) -> None:
    with contextlib.ExitStack() as undo:
        if isinstance(rule.where, str):
            try:
                inode = os.open(rule.where, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                if rule.optional:
                    return
                raise
            undo.callback(os.close, inode)
        else:
            inode = rule.where
        access = rule.access & denied
        try:
            landlock.add_rule(made, inode, access)
        except OSError as error:
            # No directory. The inode is not asked: it may be on storage that does not answer.
            if error.errno != errno.EINVAL or access in _OF_A_FILE:
                raise
            landlock.add_rule(made, inode, access & _OF_A_FILE)
