"""/proc/self/task/<tid>/children and waitpid(2): the calling process's children."""

import os
from collections.abc import Iterator


def of_self() -> frozenset[int]:
    """List the children of the calling process, zombies included.

    The process must be single-threaded. A child can be missed only while another one exits.
    Source: proc_tid_children(5).

    Raises:
        OSError: the kernel was built without CONFIG_PROC_CHILDREN.
    """
    pid = os.getpid()
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as listed:
        return frozenset(int(number) for number in listed.read().split())


def reaped() -> Iterator[tuple[int, int]]:
    """Reap each child that has ended, and give its pid and exit code, negative for a signal."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, os.waitstatus_to_exitcode(status)
