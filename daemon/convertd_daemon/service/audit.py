"""The audit record: one for each request, refused ones too, when the request ends.

It goes to the journal, field by field, so that no name can pass for a field or a second record: a
value with a newline is sent with its length. Where there is no journal it is one line on stderr, in
which every character that could break or disguise the line is escaped. It never has passphrases,
which the broker never reads.

The fields and the message ids are for outsiders to rely on: docs/operations.md.
"""

from __future__ import annotations

import enum
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, messages, values

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("convertd.audit")

JOURNAL: Final = "/run/systemd/journal/socket"


class Outcome(enum.StrEnum):
    """How a request ended."""

    DONE = "done"
    REFUSED = "refused"
    """Before anything was opened: by the policy, by a limit, or because it is invalid."""
    FAILED = "failed"
    """After it was allowed."""


MESSAGE_IDS: Final = {
    Outcome.DONE: "afb2615ed37849b78e0aac97a9567cfa",
    Outcome.REFUSED: "beb6b0f0b06c4ec28714e2e04ff81c0e",
    Outcome.FAILED: "5ed9153175004620848278f8b00abfe7",
}
"""What packaging/systemd/convertd.catalog explains. They never change."""

PRIORITIES: Final = {Outcome.DONE: 6, Outcome.REFUSED: 5, Outcome.FAILED: 4}
"""info, notice, warning. Source: syslog(3). A query that is done is debug, a bug is error."""

LONGEST: Final = 4096
"""The most characters of a refused caller's text in one field: a path's length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The caller. `comm` and `unit` are unverified, and may be empty."""

    uid: int | None
    gid: int | None
    pid: int | None
    comm: str = ""
    unit: str = ""


UNKNOWN: Final = messages.JobOutcome(done=False)
"""Of a request that had no job, or of one that was killed."""

NOBODY: Final = Caller(uid=None, gid=None, pid=None)
"""The caller on a connection that the broker does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSummary:
    """The request and its caller; texts as the caller wrote them.

    A query touches no image and no job.
    """

    operation: messages.Operation
    caller: Caller
    is_query: bool = False
    job_id: str = ""
    label: str = ""
    source: str = ""
    source_format: str = ""
    dest: str = ""
    dest_format: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request and its end. Times in seconds; None is not known.

    `found` is what its job reported.
    """

    asked: RequestSummary
    outcome: Outcome
    reason: str = ""
    detail: str = ""
    rule: str = ""
    found: messages.JobOutcome = UNKNOWN
    queued_s: float | None = None
    seconds: float | None = None

    @property
    def source_format(self) -> str:
        """The source's format as it was found, else as it was stated."""
        return self.found.source_format or self.asked.source_format

    def fields(self) -> Iterator[tuple[str, str]]:
        """The record's own fields that have a value, each with its name in the journal."""
        pairs: tuple[tuple[str, str | float | None], ...] = (
            ("OPERATION", self.asked.operation),
            ("OUTCOME", self.outcome),
            ("DECISION", "refused" if self.outcome is Outcome.REFUSED else "granted"),
            ("REASON", self.reason),
            ("DETAIL", self.detail),
            ("RULE", self.rule),
            ("UID", self.asked.caller.uid),
            ("GID", self.asked.caller.gid),
            ("PID", self.asked.caller.pid),
            ("COMM", self.asked.caller.comm),
            ("UNIT", self.asked.caller.unit),
            ("JOB", self.asked.job_id),
            ("LABEL", self.asked.label),
            ("SOURCE", self.asked.source),
            ("SOURCE_FORMAT", self.source_format),
            ("DEST", self.asked.dest),
            ("DEST_FORMAT", self.asked.dest_format),
            ("SOURCE_CACHE", self.found.source_cache),
            ("DEST_CACHE", self.found.dest_cache),
            ("METHOD", self.found.method),
            ("BYTES", self.found.virtual_size_bytes or None),
            ("ALLOCATED_BYTES", self.found.allocated_size_bytes or None),
            ("SHARED_BYTES", self.found.shared_bytes or None),
            ("QUEUED_SECONDS", None if self.queued_s is None else f"{self.queued_s:.3f}"),
            ("SECONDS", None if self.seconds is None else f"{self.seconds:.3f}"),
        )
        for name, value in pairs:
            if value not in {None, ""}:
                yield f"CONVERTD_{name}", str(value)

    def line(self) -> str:
        """The record as one line of printable text, whatever its values are."""
        pairs = (
            (name.removeprefix("CONVERTD_").lower(), value)
            for name, value in self.fields()
            if name != "CONVERTD_DECISION"
        )
        return " ".join(f"{name}={_printable(value)}" for name, value in pairs)

    @property
    def priority(self) -> int:
        """Its syslog priority."""
        if self.reason == conditions.InternalError.reason:
            return 3
        if self.outcome is Outcome.DONE and self.asked.is_query:
            return 7
        return PRIORITIES[self.outcome]


def _printable(value: str) -> str:
    """A value as it is if it can't be mistaken, else quoted and escaped as Python writes it."""
    plain = value.isprintable() and not set(value) & set(" '\"\\=")
    return value if plain else repr(value)


def write(record: Record) -> None:
    """Put a record into the journal, or on stderr if there is none.

    Blocks while the journal has no room: no request goes without a record.
    """
    line = record.line()
    if not os.path.exists(JOURNAL):
        log.info("%s", line)
        return
    from systemd import journal  # noqa: PLC0415 - 2 MiB, for those who have a journal

    journal.sendv(
        f"MESSAGE={line}",
        f"MESSAGE_ID={MESSAGE_IDS[record.outcome]}",
        f"PRIORITY={record.priority}",
        "SYSLOG_IDENTIFIER=convertd",
        *(f"{name}={value}" for name, value in record.fields()),
    )


# --- what a request asks for, not yet checked, and so cut to what can be meant ------------------


def conversion(request: values.ConvertRequest, caller: Caller) -> RequestSummary:
    """Sum up a request for a conversion, or for its check."""
    validates = request.validate_only
    return RequestSummary(
        operation=messages.Operation.VALIDATE if validates else messages.Operation.CONVERT,
        caller=caller,
        label=request.label[:LONGEST],
        source=request.source.path[:LONGEST],
        source_format=request.source.format[:LONGEST],
        dest=request.dest.path[:LONGEST],
        dest_format=request.dest.format[:LONGEST],
    )


def inspection(request: values.InspectRequest, caller: Caller) -> RequestSummary:
    """Sum up a request about an image."""
    return RequestSummary(
        operation=messages.Operation.INSPECT,
        caller=caller,
        source=request.source.path[:LONGEST],
        source_format=request.source.format[:LONGEST],
    )


def cancellation(request: messages.CancelJob, caller: Caller) -> RequestSummary:
    """Sum up a request to cancel a job."""
    operation = messages.Operation.CANCEL_JOB
    return RequestSummary(operation=operation, caller=caller, job_id=request.job_id[:LONGEST])
