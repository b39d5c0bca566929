"""A FUSE file system that never answers. Whoever asks it anything waits in state D."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

_IN_HEADER: Final = struct.Struct("<IIQQIIII")
_OUT_HEADER: Final = struct.Struct("<IiQ")
_INIT: Final = 26
"""Source: linux/fuse.h, enum fuse_opcode."""
_INIT_OUT: Final = struct.Struct("<IIIIHHIIHHI28x")


@contextlib.contextmanager
def mounted(point: Path) -> Iterator[IO[bytes]]:
    """Mount it over a file or a directory, for everybody to run into.

    Yields:
        What it was asked, as far as it took that up. From then on whoever asks can't be killed.
    """
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    kind = stat.S_IFMT(point.stat().st_mode)
    options = f"fd={fd},rootmode={kind:o},user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        if libc.mount(b"silent", os.fsencode(point), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")
        undo.callback(unmount, point)
        _answer_init(fd)
        # A request that was read and is not answered can't be interrupted, one that waits can.
        reader = subprocess.Popen(["cat"], stdin=fd, stdout=subprocess.PIPE, bufsize=0)
        undo.callback(_end, reader)
        assert reader.stdout is not None
        yield undo.enter_context(reader.stdout)


def _answer_init(fd: int) -> None:
    request = os.read(fd, 65536)
    _, opcode, unique, *_ = _IN_HEADER.unpack_from(request)
    assert opcode == _INIT
    answer = _INIT_OUT.pack(7, 31, 65536, 0, 8, 8, 65536, 1, 16, 0, 0)
    os.write(fd, _OUT_HEADER.pack(_OUT_HEADER.size + len(answer), 0, unique) + answer)


def _end(reader: subprocess.Popen[bytes]) -> None:
    reader.send_signal(signal.SIGKILL)
    reader.wait()


def unmount(point: Path) -> None:
    """Take it away; whoever waits for it goes on with an error. Once more does no harm."""
    if str(point) in Path("/proc/self/mounts").read_text(encoding="utf-8"):
        subprocess.run(["umount", "--force", "--lazy", str(point)], check=True)
