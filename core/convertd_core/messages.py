"""The messages between the front, the broker and a job.

The broker does not trust the front. Of a message it relies only on the types, and on the number of
a connection that the broker itself accepted.

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
    """List jobs. The fields are the contract's."""

    page_size: int = 0
    page_token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelJob:
    """Cancel a job."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GetAccess:
    """Report what the caller may do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetStats:
    """Report the daemon's counters."""


RequestBody = (
    values.ConvertRequest | values.InspectRequest | ListJobs | CancelJob | GetAccess | GetStats
)
"""The requests of callers. Their handlers are in convertd_daemon/broker/dispatch.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request over a connection. `call` is the front's number for it."""

    call: int
    connection: int
    body: RequestBody


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeAnswered:
    """The health check over the connection of that Probe succeeded."""

    probe: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CallAbandoned:
    """The caller of a request without a reply is gone."""

    call: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFinished:
    """The job of the call has reported that it published or failed; its process is about to end.

    Sent before the caller's reply, so that the caller's next request for the same destination is
    not refused because of this one.
    """

    call: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The front has closed its descriptor of a connection."""

    connection: int


class Operation(enum.StrEnum):
    """The operations of callers, as the audit record names them."""

    CONVERT = "convert"
    VALIDATE = "validate"
    INSPECT = "inspect"
    LIST_JOBS = "list-jobs"
    CANCEL_JOB = "cancel-job"
    GET_ACCESS = "get-access"
    GET_STATS = "get-stats"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRejected:
    """The front itself refused an invalid request: for the audit record alone.

    `connection` is 0 if the broker did not accept the call's connection.
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
    """A connection was accepted; its descriptor is attached."""

    connection: int
    uid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The broker connected to its own socket; the client's end is attached, for a health check."""

    probe: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """The request is allowed and waits; `position` counts from 1."""

    job_id: str
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A job runs; the front's end of its channel is attached."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The call fails with this condition."""

    failure: conditions.Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The process of a started job has ended, or can't be killed.

    The call ends with this failure if the job itself reported no outcome.
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
    """The assignment of a preforked process."""

    job_id: str
    grant: values.Grant


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
    """The conversion is published, or (validate_only) checked. The plan was sent before."""

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
    """How a forked job ended, for audit record and counters: its only message to the broker.

    `done` says that the image is published, or the inspection done. Otherwise `reason` is that of
    the failure, or empty if the job was ended by the broker or the front, which know why. What is
    not known is empty or 0. Sizes in bytes.
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
