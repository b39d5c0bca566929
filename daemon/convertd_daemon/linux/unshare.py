"""unshare(2), for its check only: is the calling process single-threaded."""

import errno
from typing import Final

from convertd_daemon.linux import syscall

_CLONE_THREAD: Final = 0x00010000


def is_single_threaded() -> bool:
    """Tell whether the calling process has one thread, native ones counted.

    CLONE_THREAD changes nothing; the kernel answers EINVAL where there are more threads. Where
    the call itself is filtered away (some containers), the answer is yes, or nothing would run
    there: who asks has no threads, unless by mistake.
    """
    try:
        syscall.call("unshare", _CLONE_THREAD)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True
