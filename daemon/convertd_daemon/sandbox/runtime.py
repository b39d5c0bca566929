"""What a dynamically linked program must be able to open before its first own instruction."""

import os
import struct
from typing import Final

from convertd_daemon.linux.landlock import AccessFs
from convertd_daemon.sandbox import landlock

_LOADER_CACHE: Final = "/etc/ld.so.cache"

_ELF_64_LITTLE_ENDIAN: Final = b"\x7fELF\x02\x01"
_PT_INTERP: Final = 3
_ELF_HEADER: Final = "<16sHHIQQQIHHHHHH"
_PROGRAM_HEADER: Final = "<IIQQQQQQ"


def rules(program: int) -> tuple[landlock.Rule, ...]:
    """Say what it takes to execute a program, given as a descriptor open for reading.

    EXECUTE is for the program and its loader alone. Of libraries as little as will do: an image can
    have any file read into its result that qemu-img may open. With all of /usr/lib, a header that
    was rewritten at the right moment got a file out that was root's alone (below cgi-bin; 23 of 150
    tries, 2026-11).

    Raises:
        OSError: the program can't be read.
        ValueError: it is not a 64-bit little-endian ELF file.
    """
    loader = interpreter(program)
    return (
        landlock.Rule(where=program, access=landlock.EXECUTE),
        *(_rules_of_loader(loader) if loader else ()),
        # glibc and qemu-img's probe for lock support open it.
        landlock.Rule(where="/dev/null", access=AccessFs.READ_FILE | AccessFs.WRITE_FILE),
    )


def _rules_of_loader(loader: str) -> tuple[landlock.Rule, ...]:
    readable = (*library_directories(os.path.realpath(loader)), _LOADER_CACHE)
    return (
        landlock.Rule(where=loader, access=landlock.EXECUTE),
        *(landlock.Rule(where=path, access=landlock.READ, optional=True) for path in readable),
    )


def library_directories(loader: str) -> tuple[str, ...]:
    """Say where a system keeps its libraries, from where its loader really lies.

    They lie where the loader does, below / or below /usr: /usr/lib/x86_64-linux-gnu on Debian,
    /usr/lib64 on Fedora. What a distribution keeps elsewhere makes the self-test fail, and with it
    the start.
    """
    directory = os.path.dirname(loader)
    other = directory.removeprefix("/usr") if directory.startswith("/usr/") else f"/usr{directory}"
    return (directory, other)


def interpreter(program: int) -> str | None:
    """Read which loader a program asks for; None when it is linked statically.

    Raises:
        OSError: the program can't be read.
        ValueError: it is not a 64-bit little-endian ELF file, or it is cut off.
    """
    header = os.pread(program, struct.calcsize(_ELF_HEADER), 0)
    if not header.startswith(_ELF_64_LITTLE_ENDIAN) or len(header) < struct.calcsize(_ELF_HEADER):
        raise ValueError("not a 64-bit little-endian ELF file")
    fields = struct.unpack(_ELF_HEADER, header)
    table, entry_bytes, entries = fields[5], fields[9], fields[10]
    for index in range(entries):
        entry = os.pread(program, struct.calcsize(_PROGRAM_HEADER), table + index * entry_bytes)
        if len(entry) < struct.calcsize(_PROGRAM_HEADER):
            raise ValueError("the ELF file is cut off")
        kind, _, offset, _, _, length, _, _ = struct.unpack(_PROGRAM_HEADER, entry)
        if kind == _PT_INTERP:
            return os.fsdecode(os.pread(program, length, offset).rstrip(b"\0"))
    return None
