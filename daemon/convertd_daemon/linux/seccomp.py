"""seccomp(2): load a compiled filter into the calling thread."""

import ctypes
import struct
from typing import Final

from convertd_daemon.linux import syscall

_SET_MODE_FILTER: Final = 1
INSTRUCTION_BYTES: Final = 8  # struct sock_filter


def set_mode_filter(program: bytes) -> None:
    """Load a classic BPF program; from the next system call on it binds this thread.

    Raises:
        OSError: EACCES, no_new_privs is not set; EINVAL, the kernel refuses the program.
        ValueError: the program is empty, or not a whole number of instructions.
    """
    count, rest = divmod(len(program), INSTRUCTION_BYTES)
    if rest or not count:
        raise ValueError(f"{len(program)} bytes are not a BPF program")
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: unsigned short len, then an aligned pointer.
    fprog = struct.pack("HP", count, ctypes.addressof(instructions))
    syscall.call("seccomp", _SET_MODE_FILTER, 0, fprog)
