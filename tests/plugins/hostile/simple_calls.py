"""Ask a daemon as somebody, and put what came of it in a form that can be compared."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.agent import Call, conversion
from harness.callers import ALICE, Caller
from harness.daemon import Daemon

from convertd.v1 import convert_pb2 as pb

SLOW_S: Final = 200.0
"""Nothing that an image says may take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended: OK, or a refusal's status, reason and message. `received` is all data."""

    status: str
    reason: str
    message: str
    received: bytes

    @property
    def is_ok(self) -> bool:
        """Whether it was done."""
        return self.status == "OK"

    def with_name(self, name: str, other: str) -> Outcome:
        """The same answer, had it been about another file."""
        return Outcome(
            status=self.status,
            reason=self.reason,
            message=self.message.replace(name, other),
            received=self.received.replace(name.encode(), other.encode()),
        )


def outcome_of(call: Call) -> Outcome:
    """Wait for a call's end. A refusal has to be one of the daemon's conditions, and no bug."""
    ended = call.end(SLOW_S)
    received = b"".join((*call.messages, ended.message.encode(), *ended.details))
    if ended.status == "OK":
        return Outcome(status="OK", reason="", message="", received=received)
    refusal = ended.refusal()
    assert refusal.status != "INTERNAL", refusal
    return Outcome(
        status=refusal.status, reason=refusal.reason, message=refusal.message, received=received
    )


def convert(
    daemon: Daemon, source: Path | str, dest: Path | str, stated: str = "", caller: Caller = ALICE
) -> Outcome:
    """Convert to raw."""
    request = conversion(source, dest, source_format=stated, dest_format="raw")
    return outcome_of(daemon.agent(caller).convert(request))


def overwrite(daemon: Daemon, source: Path, dest: Path) -> Outcome:
    """Convert from raw to raw, over what is there."""
    request = conversion(source, dest, source_format="raw", dest_format="raw", overwrite=True)
    return outcome_of(daemon.agent(ALICE).convert(request))


def inspect(
    daemon: Daemon, source: Path | str, stated: str = "", caller: Caller = ALICE
) -> Outcome:
    """Inspect."""
    request = pb.InspectRequest(source=pb.Source(path=str(source), format=stated))
    return outcome_of(daemon.agent(caller).call("Inspect", request))


def contains(path: Path, marker: bytes) -> bool:
    """Whether a file, which may be sparse, has these bytes in it. No file has none."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        end = os.fstat(fd).st_size
        at = _data_from(fd, 0, end)
        while at < end:
            hole = os.lseek(fd, at, os.SEEK_HOLE)
            if marker in os.pread(fd, hole - at, at):
                return True
            at = _data_from(fd, hole, end)
    finally:
        os.close(fd)
    return False


def _data_from(fd: int, at: int, end: int) -> int:
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError:  # ENXIO, a hole to the end
        return end


def file_of(owner: Caller, path: Path, data: bytes) -> Path:
    """Write a file that is somebody's, and nobody else's to read."""
    path.write_bytes(data)
    path.chmod(0o600)
    os.chown(path, owner.uid, owner.gid)
    return path
