"""mincore(2): which pages of a file are in the page cache."""

import ctypes
import mmap
import os
from typing import Final

_mincore: Final = ctypes.CDLL(None, use_errno=True).mincore
_RESIDENT: Final = 1


def resident_pages(fd: int, offset: int, length: int) -> int:
    """Count the pages of a range of a file that are in the page cache.

    The range begins at a page and lies in the file. The kernel reports all pages as resident unless
    the caller owns the file, may write it, or has CAP_FOWNER. Source: mincore(2).

    Raises:
        OSError: it can't be mapped, or the call is refused.
    """
    # A private mapping works with a read-only descriptor and has an address; nothing is written to
    # it. It is dropped, not closed: mmap.close() would fail in a job that is cancelled in between,
    # while `first` still refers to it.
    area = mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=offset)
    first = (ctypes.c_char * length).from_buffer(area)
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    if _mincore(first, ctypes.c_size_t(length), pages) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mincore: {os.strerror(error)}")
    return sum(page & _RESIDENT for page in pages)
