"""execveat(2): execute a descriptor, so that the checked program is the one that runs."""

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

from convertd_daemon.linux import syscall

AT_EMPTY_PATH: Final = 0x1000


def execveat(program: int, argv: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Execute the program behind a descriptor; returns only by raising.

    The descriptor may be close-on-exec if it is a binary; a script would need it open.

    Raises:
        OSError: the program can't be executed; the process is as it was.
        ValueError: an argument has a NUL byte, at which the kernel would silently cut it.
    """
    arguments = [os.fsencode(argument) for argument in argv]
    variables = [os.fsencode(f"{name}={value}") for name, value in environment.items()]
    if any(b"\0" in text for text in (*arguments, *variables)):
        raise ValueError("embedded null byte")
    syscall.call("execveat", program, b"", _vector(arguments), _vector(variables), AT_EMPTY_PATH)
    raise AssertionError("execveat returned")


def _vector(texts: list[bytes]) -> "ctypes.Array[ctypes.c_char_p]":
    return (ctypes.c_char_p * (len(texts) + 1))(*texts, None)
