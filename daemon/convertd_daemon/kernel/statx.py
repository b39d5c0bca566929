"""statx(2): what a file system says of direct I/O on one of its inodes."""

import ctypes
import struct
from dataclasses import dataclass
from typing import Final

from convertd_daemon.kernel import syscall

# Source: linux/stat.h, linux/fcntl.h.
_BYTES: Final = 256
_DIOALIGN: Final = 0x2000
_AT_EMPTY_PATH: Final = 0x1000
_MASK: Final = struct.Struct("=I")
_ALIGNMENTS: Final = struct.Struct("=II")
_ALIGNMENTS_AT: Final = 152  # stx_dio_mem_align, stx_dio_offset_align


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectAlignment:
    """What direct I/O must be aligned to, in bytes, in memory and in the file; 0: there is none."""

    memory: int
    offset: int


def direct_alignment(fd: int) -> DirectAlignment | None:
    """Ask what direct I/O on the inode takes; None where kernel or file system do not say.

    Kernels say it since Linux 6.1, of ext4, XFS, f2fs and block devices; btrfs, tmpfs and most
    network file systems do not.

    Raises:
        OSError: the kernel's own answer.
    """
    told = ctypes.create_string_buffer(_BYTES)
    syscall.call("statx", fd, b"", _AT_EMPTY_PATH, _DIOALIGN, told)
    (known,) = _MASK.unpack_from(told)
    if not known & _DIOALIGN:
        return None
    memory, offset = _ALIGNMENTS.unpack_from(told, _ALIGNMENTS_AT)
    return DirectAlignment(memory=memory, offset=offset)
