"""/proc/self/task/<tid>/children: the processes whose parent the calling process is."""

import os


def of_self() -> frozenset[int]:
    """List the children of the calling process, ended ones that were not waited for included.

    Of one with a single thread. A child can be missed only while another one ends. Source:
    proc_tid_children(5).

    Raises:
        OSError: the kernel was built without CONFIG_PROC_CHILDREN.
    """
    pid = os.getpid()
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as listed:
        return frozenset(int(number) for number in listed.read().split())
