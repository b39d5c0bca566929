"""Keep each passphrase on a pipe of its own, until there is a job to send it to."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from convertd_core import messages, validation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon import channel


@contextlib.contextmanager
def holding(secrets: list[bytes]) -> Iterator[tuple[int, ...]]:
    """Write each passphrase to a pipe; gives the reading ends, and closes them at the end.

    The list is emptied: from then on only the pipes hold the passphrases.

    Raises:
        conditions.BadOption: one is empty or too long.
    """
    with contextlib.ExitStack() as stack:
        ends = []
        while secrets:
            reader = _pipe_with(secrets.pop(0))
            stack.callback(os.close, reader)
            ends.append(reader)
        yield tuple(ends)


def hand_on(held: tuple[int, ...], job_channel: channel.Channel) -> None:
    """Send each passphrase to a job that has just started, over its channel.

    Raises:
        channel.Closed: the job is gone.
    """
    for reader in held:
        # There is room: nothing was sent on it before.
        job_channel.send_bytes(
            messages.PASSPHRASE + os.read(reader, validation.MAX_PASSPHRASE_BYTES), wait=False
        )


def _pipe_with(secret: bytes) -> int:
    validation.check_passphrase("encryption.passphrase", secret)
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, validation.MAX_PASSPHRASE_BYTES)
        os.write(writer, secret)
    finally:
        os.close(writer)
    return reader
