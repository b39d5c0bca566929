"""Confine a process of ours that goes on running: the front, and a job. Fails closed.

Landlock, no_new_privs and seccomp bind the calling thread and what it starts afterwards, so both
refuse to work in a process that has more threads already.
"""

from collections.abc import Iterable

from convertd_daemon.linux import prctl
from convertd_daemon.linux.landlock import AccessFs
from convertd_daemon.sandbox import landlock, runtime, seccomp


def confine_front(private: int | str, compiled: bytes) -> None:
    """Leave the front its private directory's sockets, /dev/urandom, and no way to others.

    Nor is there a way to it: it can't be traced, nor its memory read or dumped, by its own uid.

    `private` is a directory, as a descriptor or a path; `compiled` is
    seccomp.compile_profile(seccomp.FRONT). Everything must be imported before, and no
    thread started.

    Raises:
        LandlockMissing: the kernel has none.
        OSError: a step was refused; the process may be half confined: exit.
        ValueError: there are several threads.
    """
    prctl.set_dumpable(dumpable=False)
    landlock.restrict(
        (
            landlock.Rule(where=private, access=AccessFs.MAKE_SOCK | AccessFs.REMOVE_FILE),
            # absl, below gRPC, aborts the process without it.
            landlock.Rule(where="/dev/urandom", access=landlock.READ),
        )
    )
    seccomp.load(compiled)


def confine_job(program: int, rules: Iterable[landlock.Rule]) -> None:
    """Leave a job the inodes and directories of `rules`, and what qemu-img needs to start.

    Layers of Landlock intersect: what a job may not do, none of its qemu-img may. So `rules` hold
    all that a later Confinement will name. From a kernel's ABI 6 on, the job can then signal only
    itself and what it starts from now on: no qemu-img may run meanwhile.
    `program` is qemu-img, open for reading. An inode of the job's that has no path (a pipe, a
    socket) needs no rule.

    Raises:
        LandlockMissing: the kernel has none.
        OSError: a step was refused; the process may be half confined: exit.
        ValueError: there are several threads, or the program is no ELF file.
    """
    landlock.restrict((*runtime.rules(program), *rules))
