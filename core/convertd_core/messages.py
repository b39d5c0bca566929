"""What the front, the broker and a job say to each other.

The broker takes the front for an enemy. It believes no more of a message than its types and the
number of a connection that the broker itself accepted.

A new call of the contract is a body of a request here, and one of a reply if no other fits.
"""

from __future__ import annotations

import datetime
import enum
import typing
from dataclasses import dataclass
from typing import Final

from convertd_core import conditions, results, values

# --- front to broker ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The front serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListJobs:
    """Which jobs there are, in the contract's words."""

    page_size: int = 0
    page_token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelJob:
    """A job is to end."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GetAccess:
    """What the caller may do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStats:
    """The daemon's counters."""


RequestBody = (
    values.ConvertRequest | values.InspectRequest | ListJobs | CancelJob | GetAccess | GetStats
)
"""What a caller may ask for. Who handles it: convertd_daemon/broker/dispatch.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Somebody asks for something over a connection. `call` is the front's own number for it."""

    call: int
    connection: int
    body: RequestBody


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeAnswered:
    """A health check came back over the connection that came with that Probe."""

    probe: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallAbandoned:
    """The caller of a request is gone that was not yet answered."""

    call: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFinished:
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
class RequestRejected:
    """The front itself refused a request, which could not be meant: for the audit record alone.

    `connection` is 0 if the call came by none that the broker accepted.
    """

    connection: int
    operation: Operation
    reason: str


FromFront = (
    Ready | Request | ProbeAnswered | CallAbandoned | JobFinished | Released | RequestRejected
)
FROM_FRONT: Final = typing.get_args(FromFront)

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
class Queued:
    """The request is allowed and waits; `position` counts from 1."""

    job_id: str
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A job runs; the front's end of its channel comes along as a descriptor."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The call ends with this condition."""

    failure: conditions.Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The process of a started job is gone, or won't answer any more.

    The failure is what the call ends with when the job itself did not say how it ended.
    """

    job_id: str
    failure: conditions.Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyComplete:
    """The call's answer is complete: the last of the jobs was sent, the job is being cancelled.

    `next_page_token` leads to more jobs, if there are.
    """

    next_page_token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The answer to GetStats begins with this; what was counted follows, then a ReplyComplete."""

    start_time: datetime.datetime
    jobs_running: int
    jobs_queued: int
    connections: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramBucket:
    """How many values are not above a bound; the last bucket's is infinite."""

    upper_bound_seconds: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionStats:
    """Ended conversions of one pair of formats with one outcome, by one method; None if none."""

    source_format: str
    dest_format: str
    reason: str
    method: results.Method | None
    count: int
    bytes: int
    shared_bytes: int
    seconds: float
    durations: tuple[HistogramBucket, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalStats:
    """Requests refused for one reason."""

    reason: str
    count: int


ReplyBody = (
    Queued
    | Started
    | Refused
    | ReplyComplete
    | results.Job
    | results.Access
    | Stats
    | ConversionStats
    | RefusalStats
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Something about a call that the front made."""

    call: int
    body: ReplyBody


FromBroker = Connected | Probe | Ended | Reply
FROM_BROKER: Final = typing.get_args(FromBroker)

# --- to a job ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StartJob:
    """What a process does that was forked ahead."""

    job_id: str
    grant: values.ConvertGrant | values.InspectGrant


PASSPHRASE: Final = b"P"
"""What a passphrase on its way to a job begins with, so that an empty one is not the end."""

# --- to a job that was not forked ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRequest:
    """What a job does that is started as a program, with its caller's own rights.

    `qemu_img` is the program's absolute path.
    """

    qemu_img: str
    request: values.ConvertRequest | values.InspectRequest


# --- job to front ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The job knows what it will do."""

    plan: results.Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """The job is this far. Sent without waiting; some may be lost."""

    progress: results.Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeeded:
    """The conversion is published, or was only to be checked. The plan was said before."""

    result: results.ConvertResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """What the image is."""

    image: results.ImageInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The job was not done."""

    failure: conditions.Failure


FROM_JOB: Final = (Planned, Progressed, Succeeded, Inspected, Failed)

# --- job to broker -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
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
    method: results.Method | None = None
    virtual_size_bytes: int = 0
    allocated_size_bytes: int = 0
    shared_bytes: int = 0
