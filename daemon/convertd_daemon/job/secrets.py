"""Passphrases, from the job's channel to the pipe from which qemu-img reads them.

A passphrase is in this process's memory and in the front's for as long as it takes, in pipes, and
once in the channel from the front to the job. It is in no file, argument or logged message. The
broker never has it, nor a descriptor from which it could be read: what the front sends for one
could be anything.

Not in a memfd either: Landlock never restricts those, and an image whose header names
/proc/self/fd/N got the passphrase into the result. A pipe can be read only once, by the `secret`
object that qemu-img makes before it opens any image.
"""

from __future__ import annotations

import contextlib
import os
import select
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from convertd_core import codec, conditions, validation
from convertd_daemon import channel
from convertd_daemon.job.qemu import plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.sandbox.identity import Identity

LIMIT_S: Final = 10.0
"""The front sends it as soon as it knows that the job has started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """The passphrases of a job. Empty where there is none. Never shown."""

    source: bytes = field(default=b"", repr=False)
    dest: bytes = field(default=b"", repr=False)


def take(job_channel: channel.Channel, *, source: bool, dest: bool) -> Secrets:
    """Receive from the front the passphrases that the request needs, the source's first.

    Raises:
        conditions.BadMessage: one did not come in time, or something else did.
        conditions.BadOption: one is empty or too long.
        channel.Closed: the result is no longer wanted.
    """
    asked = {plan.SOURCE_SECRET: source, plan.DEST_SECRET: dest}
    return Secrets(**{name: _receive(name, job_channel) for name in asked if asked[name]})


def _receive(name: str, job_channel: channel.Channel) -> bytes:
    if not select.select([job_channel], [], [], LIMIT_S)[0]:
        raise conditions.BadMessage(problem="a passphrase is missing")
    try:
        secret = job_channel.receive_passphrase(validation.MAX_PASSPHRASE_BYTES + 1)
    except codec.CodecError as error:
        raise conditions.BadMessage(problem="not a passphrase") from error
    validation.check_passphrase(f"{name}.encryption.passphrase", secret)
    return secret


@contextlib.contextmanager
def as_pipes(secrets: Secrets, worker: Identity | None) -> Iterator[dict[str, int]]:
    """Put the passphrases on fresh pipes that only the worker can open; gives the ends by id."""
    with contextlib.ExitStack() as stack:
        ends = {}
        known = {plan.SOURCE_SECRET: secrets.source, plan.DEST_SECRET: secrets.dest}
        for name, secret in known.items():
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
