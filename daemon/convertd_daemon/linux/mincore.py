"""mincore(2): which pages of a file are in the page cache."""

import ctypes
import mmap
import os
from typing import Final

_mincore: Final = ctypes.CDLL(None, use_errno=True).mincore
_RESIDENT: Final = 1


def resident_pages(fd: int, offset: int, length: int) -> int:
    """Count the pages of a part of a file that are in memory now.

    The part begins at a page and lies in the file. Of a file that the calling process neither owns
    nor may write, nor has CAP_FOWNER over, the kernel says that all of it is. Source: mincore(2).

    Raises:
        OSError: it can't be mapped, or the call is refused.
    """
    # A private mapping, for that can be of a descriptor that is open for reading only, and have an
    # address; nothing is ever written to it. It is let go of, not closed: a job that is cut short
    # in between would fail to close what is still referred to.
    area = mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=offset)
    first = (ctypes.c_char * length).from_buffer(area)
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    if _mincore(first, ctypes.c_size_t(length), pages) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mincore: {os.strerror(error)}")
    return sum(page & _RESIDENT for page in pages)
