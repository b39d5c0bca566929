"""What the front, the broker and a job say to each other, and the sockets they say it on.

Every channel is an AF_UNIX SOCK_SEQPACKET pair: a message arrives whole or not at all, and either
end sees at once when the other is gone. One joins broker and front for as long as both live; one
joins a job and the front, and *is* the job's life: whoever closes it ends the job.

The broker takes the front for an enemy. It believes no more of a message than its types and the
number of a connection that the broker itself accepted.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

from convertd_daemon import codec, errors, model
from convertd_daemon.kernel import scm_rights

MAX_MESSAGE_BYTES: Final = 160 * 1024
"""Two paths of 4 KiB, each byte escaped to six, and then some. Below the default SO_SNDBUF."""

ONE_DESCRIPTOR: Final = 1
"""What may come with a message of the broker's to the front. Nobody else is sent any."""

PASSPHRASE: Final = b"P"
"""What a passphrase on its way to a job begins with, so that an empty one is not the end."""


class Closed(Exception):
    """The other end of the channel is gone."""


class TooLong(Exception):
    """A message of more bytes than the other end takes. Nothing was sent."""


# --- front to broker ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The front serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert:
    """Somebody asks for a conversion. `call` is the front's own number for the call."""

    call: int
    connection: int
    request: model.ConvertRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """Somebody asks about an image."""

    call: int
    connection: int
    request: model.InspectRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ListJobs:
    """Somebody asks which jobs there are, in the contract's words."""

    call: int
    connection: int
    page_size: int = 0
    page_token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelJob:
    """Somebody wants a job to end."""

    call: int
    connection: int
    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GetAccess:
    """Somebody asks what it may do."""

    call: int
    connection: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStats:
    """Somebody asks for the daemon's counters."""

    call: int
    connection: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """A health check came back over the connection that came with that Probe."""

    probe: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """The caller of a Convert or Inspect that still waits is gone."""

    call: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The job of the call has said that it published or failed; its process is about to end.

    Said before the caller hears it, so that whoever asks for the same destination next is not told
    that it is being written.
    """

    call: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The front has closed its descriptor of a connection."""

    connection: int


class Operation(enum.StrEnum):
    """What somebody asks for, in the audit record's words."""

    CONVERT = "convert"
    VALIDATE = "validate"
    INSPECT = "inspect"
    LIST_JOBS = "list-jobs"
    CANCEL_JOB = "cancel-job"
    GET_ACCESS = "get-access"
    GET_STATS = "get-stats"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """The front itself refused a request, which could not be meant: for the audit record alone.

    `connection` is 0 if the call came by none that the broker accepted.
    """

    connection: int
    operation: Operation
    reason: str


FROM_FRONT: Final = (
    Ready,
    Convert,
    Inspect,
    ListJobs,
    CancelJob,
    GetAccess,
    GetStats,
    Probed,
    Abandon,
    Finished,
    Released,
    Rejected,
)

# --- broker to front ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """Somebody connected; the connection comes along as a descriptor."""

    connection: int
    uid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The broker called its own socket: the calling end comes along, to check the health over."""

    probe: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The request is allowed and waits; `position` counts from 1."""

    call: int
    job_id: str
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A job runs; the front's end of its channel comes along as a descriptor."""

    call: int
    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The call ends with this condition."""

    call: int
    failure: errors.Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The process of a started job is gone, or won't answer any more.

    The failure is what the call ends with when the job itself did not say how it ended.
    """

    job_id: str
    failure: errors.Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEntry:
    """One job in the answer to ListJobs. `started` and `queued` are Unix times in seconds."""

    call: int
    job_id: str
    uid: int
    source: str
    dest: str
    source_format: str
    dest_format: str
    label: str
    state: JobState
    position: int
    queued: float
    started: float | None


class JobState(enum.StrEnum):
    """What the broker knows of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    UNKILLABLE = "unkillable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The call's answer is complete: the last of the jobs was sent, the job is being cancelled.

    `next_page_token` leads to more jobs, if there are.
    """

    call: int
    next_page_token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """What runs here. The formats are those of ours that qemu-img knows too."""

    daemon: str
    qemu_img: str
    kernel: str
    landlock_abi: int
    compressions: tuple[str, ...]
    formats: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessReport:
    """The answer to GetAccess."""

    call: int
    uid: int
    gid: int
    groups: frozenset[int]
    rights: model.AccessRights
    limits: model.Limits
    versions: Versions


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsReport:
    """The answer to GetStats begins with this; Done ends it. Bounds and times in seconds."""

    call: int
    started: float
    running: int
    queued: int
    connections: int
    bounds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionStats:
    """Conversions of one pair of formats with one end. `buckets` has one more than the bounds."""

    call: int
    source_format: str
    dest_format: str
    reason: str
    count: int
    virtual_bytes: int
    seconds: float
    buckets: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalStats:
    """Requests refused for one reason."""

    call: int
    reason: str
    count: int


ToFront = (
    Connected
    | Probe
    | Waiting
    | Started
    | Refused
    | Ended
    | JobEntry
    | Done
    | AccessReport
    | StatsReport
    | ConversionStats
    | RefusalStats
)

FROM_BROKER: Final = (
    Connected,
    Probe,
    Waiting,
    Started,
    Refused,
    Ended,
    JobEntry,
    Done,
    AccessReport,
    StatsReport,
    ConversionStats,
    RefusalStats,
)

# --- to a job ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """What a process does that was forked ahead. Exactly one of the grants is there."""

    job_id: str
    convert: model.Grant | None
    inspect: model.InspectGrant | None

    @property
    def grant(self) -> model.Grant | model.InspectGrant:
        """The one that is there.

        Raises:
            ValueError: none is.
        """
        grant = self.convert or self.inspect
        if grant is None:
            raise ValueError("an order without a grant")
        return grant


# --- to a job that was not forked ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a job does that is started as a program, with its caller's own rights.

    Exactly one of the requests is there. `qemu_img` is the program's absolute path.
    """

    qemu_img: str
    convert: model.ConvertRequest | None
    inspect: model.InspectRequest | None


# --- job to front ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The job knows what it will do."""

    plan: model.Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """The job is this far. Sent without waiting; some may be lost."""

    progress: model.Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeeded:
    """The conversion is published."""

    published: model.Published


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """What the image is. `chain` begins with the image itself; `raw_json` is qemu-img's.

    `complete` says that the chain goes down to its base.
    """

    chain: tuple[model.Member, ...]
    complete: bool
    raw_json: str
    contents: model.Contents
    warnings: tuple[model.Warned, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The job was not done."""

    failure: errors.Failure


FROM_JOB: Final = (Planned, Progressed, Succeeded, Inspected, Failed)

# --- job to broker -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """How a forked job ended, for the audit record and the counters: its only word to the broker.

    `done` says that the image is published, or whatever else was asked is done. Otherwise `reason`
    is that of the failure, or empty if the job was cut short, and whoever cut it knows why.
    What was never found out is empty or 0. Sizes in bytes.
    """

    done: bool
    reason: str = ""
    detail: str = ""
    source_format: str = ""
    source_cache: str = ""
    dest_cache: str = ""
    virtual_size_bytes: int = 0
    allocated_size_bytes: int = 0


# --- the socket --------------------------------------------------------------------------------


def encoded(message: object) -> bytes:
    """Put a message into bytes that can be sent. What a queue holds must be this.

    Raises:
        TooLong: it has more bytes than the other end takes.
    """
    data = codec.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise TooLong(f"{type(message).__name__} of {len(data)} bytes")
    return data


class Channel:
    """One end of a SOCK_SEQPACKET pair, with typed messages and descriptors.

    Owns its socket. Not for two threads at once.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Make both ends of a new channel, close-on-exec, on which no descriptor is sent."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (here, there):
            scm_rights.refuse(end)
        return cls(here), cls(there)

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self.sock.fileno()

    def close(self) -> None:
        """Close this end."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, message: object, *descriptors: int, wait: bool = True) -> bool:
        """Send a message, with descriptors that the other end gets its own copies of.

        With `wait` false, False says that there was no room and nothing was sent.

        Raises:
            Closed: the other end is gone.
            TooLong: nothing was sent.
        """
        return self.send_bytes(encoded(message), *descriptors, wait=wait)

    def send_bytes(self, data: bytes, *descriptors: int, wait: bool = True) -> bool:
        """Send an encoded message. See `send`."""
        try:
            scm_rights.send(self.sock, data, descriptors, wait=wait)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error
        return True

    def receive(
        self, *kinds: type[Any], wait: bool = True, most_descriptors: int = 0
    ) -> tuple[Any, list[int]]:
        """Take one message of these kinds, and the descriptors that came with it (now ours).

        Raises:
            Closed: the other end is gone.
            BlockingIOError: `wait` is false and there is nothing.
            CodecError: the message is none of these. Its descriptors are closed. Where none are
                expected, one that has any is not taken: it is there still, and nothing comes after.
        """
        data, descriptors = self._receive(MAX_MESSAGE_BYTES, most_descriptors, wait=wait)
        with _closing_on_error(descriptors):
            return codec.decode(data, *kinds), descriptors

    def receive_passphrase(self, most_bytes: int) -> bytes:
        """Wait for a passphrase, and take it. It is no message: nothing logs or repeats it.

        Raises:
            Closed: the other end is gone.
            CodecError: it is none, or has more bytes.
        """
        data, _ = self._receive(len(PASSPHRASE) + most_bytes, 0, wait=True)
        if not data.startswith(PASSPHRASE):
            raise codec.CodecError("no passphrase")
        return data.removeprefix(PASSPHRASE)

    def _receive(
        self, most_bytes: int, most_descriptors: int, *, wait: bool
    ) -> tuple[bytes, list[int]]:
        try:
            data, descriptors = scm_rights.receive(
                self.sock, most_bytes, most_descriptors, wait=wait
            )
        except ConnectionResetError as error:
            raise Closed from error
        except scm_rights.Attached as error:
            raise codec.CodecError("a message with descriptors") from error
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            raise codec.CodecError("a message that is too long") from error
        if not data:
            scm_rights.close_all(descriptors)
            raise Closed
        return data, descriptors


@contextlib.contextmanager
def _closing_on_error(descriptors: list[int]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        scm_rights.close_all(descriptors)
        raise
