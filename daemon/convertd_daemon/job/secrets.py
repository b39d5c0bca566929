"""Passphrases, from the pipe on which they came to the pipe from which qemu-img reads them.

A passphrase is in this process's memory and in the front's for as long as it takes, and in pipes.
It is in no file, argument or message. Not in a memfd either: Landlock never restricts those, and an
image whose header names /proc/self/fd/N got the passphrase into the result. A pipe can be read only
once, by the `secret` object that qemu-img makes before it opens any image.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from convertd_daemon import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.sandbox.identity import Identity

MAX_BYTES: Final = 4096

SOURCE: Final = "source"
DEST: Final = "dest"
"""The ids of the `secret` objects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """The passphrases of a job. Empty where there is none. Never shown."""

    source: bytes = field(default=b"", repr=False)
    dest: bytes = field(default=b"", repr=False)


def take(descriptors: tuple[int, ...], *, source: bool, dest: bool) -> Secrets:
    """Read the passphrases of the ends that have one, in that order; closes the descriptors.

    Raises:
        errors.BadMessage: there are more or fewer than that, or not on pipes.
        errors.BadOption: one is empty or too long.
    """
    wanted = [name for name, asked in ((SOURCE, source), (DEST, dest)) if asked]
    try:
        if len(wanted) != len(descriptors):
            raise errors.BadMessage(problem="a passphrase is missing, or one too many")
        found = {name: _read(name, fd) for name, fd in zip(wanted, descriptors, strict=True)}
    finally:
        for fd in descriptors:
            os.close(fd)
    return Secrets(**found)


def _read(name: str, fd: int) -> bytes:
    """Read what is in a pipe whose writer is closed. Never waits."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        raise errors.BadMessage(problem="a passphrase that is not on a pipe")
    os.set_blocking(fd, False)
    try:
        secret = os.read(fd, MAX_BYTES + 1)
    except BlockingIOError as error:
        raise errors.BadMessage(problem="a passphrase that is not there yet") from error
    if not 1 <= len(secret) <= MAX_BYTES:
        problem = f"must have 1 to {MAX_BYTES} bytes"
        raise errors.BadOption(field=f"{name}.encryption.passphrase", problem=problem)
    return secret


@contextlib.contextmanager
def offered(secrets: Secrets, worker: Identity | None) -> Iterator[dict[str, int]]:
    """Put the passphrases on fresh pipes that only the worker can open; gives the ends by id."""
    with contextlib.ExitStack() as stack:
        ends = {}
        for name, secret in ((SOURCE, secrets.source), (DEST, secrets.dest)):
            if secret:
                ends[name] = _pipe_with(secret, worker)
                stack.callback(os.close, ends[name])
        yield ends


def _pipe_with(secret: bytes, worker: Identity | None) -> int:
    reader, writer = os.pipe()
    try:
        # Fits: a pipe holds a page at least. Source: pipe(7).
        os.write(writer, secret)
        if worker is not None:
            os.fchown(reader, worker.uid, worker.gid)
    finally:
        os.close(writer)
    return reader
