"""What descriptors a piece of code leaves open in the process that runs it."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def open_descriptors() -> set[tuple[int, str]]:
    """Give each descriptor of this process with what it refers to; a socket or a pipe by its inode.

    Subtract an earlier answer to see what is new. To count won't do: what another test left to
    the garbage collector, or to a thread of gRPC's, is closed at any time.
    """
    descriptors = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            descriptors.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return descriptors


@contextlib.contextmanager
def none_left_open() -> Iterator[None]:
    """See that the block, if it ends well, leaves no descriptor that was not there before."""
    before = open_descriptors()
    yield
    assert open_descriptors() - before == set()
