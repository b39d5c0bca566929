"""/proc/self/task/<tid>/children: the calling process's children."""

import os


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
