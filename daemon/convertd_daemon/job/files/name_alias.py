"""A path whose last name is the destination's, for the one format that writes that name down.

A VMDK's descriptor names its own file. qemu takes that from the path it is given, which for us
would be the number of a descriptor. So for a VMDK there is a link of the right name, in a directory
of this job's own, that leads to the descriptor. It leads nowhere for any other process.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from typing import TYPE_CHECKING, Final

from convertd_daemon.linux import getrandom
from convertd_daemon.linux.landlock import AccessFs
from convertd_daemon.sandbox import landlock

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMATS_THAT_NAME_THEMSELVES: Final = frozenset({"vmdk"})

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]")
"""What could end a quoted name or a line in the descriptor, or mean a protocol to qemu."""


@contextlib.contextmanager
def create(directory: str, name: str, fd: int) -> Iterator[str]:
    """Make the link in a fresh directory below `directory`, and remove both afterwards.

    An empty `directory` is the system's own for temporary files.

    Raises:
        OSError: it can't be made.
    """
    own = os.path.join(directory or tempfile.gettempdir(), f"convertd-{getrandom.hex_name(8)}")
    os.mkdir(own, 0o700)
    # For the worker to pass through; not subject to our umask.
    os.chmod(own, 0o711)  # noqa: S103 - it holds one link, and no other user can list it
    path = os.path.join(own, _UNSAFE.sub("_", name))
    try:
        os.symlink(f"/proc/self/fd/{fd}", path)
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.rmdir(own)


def rule(path: str) -> landlock.Rule:
    """What it takes to remove the link and its directory once Landlock is in force."""
    parent = os.path.dirname(os.path.dirname(path))
    return landlock.Rule(where=parent, access=AccessFs.REMOVE_FILE | AccessFs.REMOVE_DIR)
