"""unshare(2), only to check that the calling process is single-threaded."""

import errno
from typing import Final

from convertd_daemon.linux import syscall

_CLONE_THREAD: Final = 0x00010000


def is_single_threaded() -> bool:
    """Whether the calling process has one thread, native threads included.

    CLONE_THREAD changes nothing; the kernel returns EINVAL for a process with more threads. Where
    a filter refuses the call itself (some containers), the result is True, or the daemon could not
    run there: its callers have more threads only by mistake.
    """
    try:
        syscall.call("unshare", _CLONE_THREAD)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True
