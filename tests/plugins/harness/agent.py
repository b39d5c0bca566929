"""Raw gRPC calls as a real user: many at once, quickly, and with whatever bytes a test wants.

The calls are made by a process of that user's (agent_script.py), which holds one connection. The
tests' own process must not load gRPC: it forks, and gRPC's threads don't survive that.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from convertd.v1 import convert_pb2 as pb
from harness import callers, waiting

SCRIPT: Final = Path(__file__).with_name("agent_script.py").read_text(encoding="utf-8")

DOMAIN: Final = "convertd"

METHODS: Final = {
    method.name: method for method in pb.DESCRIPTOR.services_by_name["ConvertService"].methods
}
"""The calls of the contract."""

Reply = TypeVar("Reply", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """How a call ended that the daemon ended: a status, and one ErrorInfo with its reason.

    `fields` are those of a BadRequest, `violations` the (type, subject) of a PreconditionFailure.
    """

    status: str
    reason: str
    message: str
    metadata: dict[str, str]
    fields: tuple[str, ...]
    violations: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a call ended, as it came over the wire."""

    status: str
    message: str
    details: tuple[bytes, ...]

    def refusal(self) -> Refusal:
        """The condition with which the daemon ended the call.

        Raises:
            AssertionError: there is not exactly one ErrorInfo, or not of convertd's domain, or the
                details contradict the status.
        """
        assert len(self.details) == 1, self
        status = status_pb2.Status.FromString(self.details[0])
        (info,) = _of_kind(status, error_details_pb2.ErrorInfo)
        assert info.domain == DOMAIN
        assert status.message == self.message
        assert status.code == _NUMBERS[self.status]
        bad_requests = _of_kind(status, error_details_pb2.BadRequest)
        preconditions = _of_kind(status, error_details_pb2.PreconditionFailure)
        assert len(status.details) == 1 + len(bad_requests) + len(preconditions)
        return Refusal(
            status=self.status,
            reason=info.reason,
            message=self.message,
            metadata=dict(info.metadata),
            fields=tuple(item.field for bad in bad_requests for item in bad.field_violations),
            violations=tuple(
                (item.type, item.subject) for one in preconditions for item in one.violations
            ),
        )


_NUMBERS: Final = {
    "CANCELLED": 1,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
    "UNAUTHENTICATED": 16,
}
"""Source: google/rpc/code.proto."""


def _of_kind(status: status_pb2.Status, kind: type[Reply]) -> list[Reply]:
    found = []
    for detail in status.details:
        message = kind()
        if detail.Unpack(message):
            found.append(message)
    return found


class Agent:
    """A process of a user's that makes calls over one connection."""

    def __init__(self, caller: callers.Caller, socket: Path, log: Path) -> None:
        """Start it. It connects with its first call."""
        self.caller = caller
        self._numbers = itertools.count(1)
        self._received: dict[int, deque[dict[str, Any]]] = {}
        self._rest = b""
        with log.open("ab") as stderr:
            self._process = caller.popen(
                [callers.PYTHON, "-I", "-c", SCRIPT, str(socket)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
            )

    @property
    def pid(self) -> int:
        """The process that is connected."""
        return self._process.pid

    def call(
        self, method: str, request: Message | bytes, *, timeout_s: float | None = None
    ) -> Call:
        """Begin a call. `method` is one of the service's, or a full path."""
        number = next(self._numbers)
        data = request if isinstance(request, bytes) else request.SerializeToString()
        self._received[number] = deque()
        self._send(
            id=number,
            method=method if method.startswith("/") else f"/{callers.SERVICE}/{method}",
            data=base64.b64encode(data).decode(),
            timeout=timeout_s,
        )
        return Call(self, number)

    def convert(self, request: pb.ConvertRequest, *, timeout_s: float | None = None) -> Call:
        """Begin a conversion."""
        return self.call("Convert", request, timeout_s=timeout_s)

    def ask(self, method: str, request: Message, kind: type[Reply]) -> Reply:
        """Make a call that has one answer, and give it."""
        call = self.call(method, request)
        ended = call.end()
        assert ended.status == "OK", ended
        (data,) = call.messages
        return kind.FromString(data)

    def jobs(self) -> list[pb.Job]:
        """The jobs that this user sees."""
        request, listed = pb.ListJobsRequest(), list[pb.Job]()
        while True:
            page = self.ask("ListJobs", request, pb.ListJobsResponse)
            listed += page.jobs
            if not page.next_page_token:
                return listed
            request.page_token = page.next_page_token

    def access(self) -> pb.GetAccessResponse:
        """Who the daemon takes this user for."""
        return self.ask("GetAccess", pb.GetAccessRequest(), pb.GetAccessResponse)

    def cancel_job(self, job_id: str) -> pb.Job:
        """Cancel a job."""
        request = pb.CancelJobRequest(job_id=job_id)
        return self.ask("CancelJob", request, pb.CancelJobResponse).job

    def kill(self) -> None:
        """Kill the process: its connection ends without a word."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """End the process, and with it the connection."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(waiting.DEADLINE_S)

    # --- for Call ----------------------------------------------------------------------------

    def cancel_call(self, number: int) -> None:
        """Cancel a call, as gRPC does."""
        self._send(id=number)

    def next(self, number: int, deadline_s: float) -> dict[str, Any]:
        """Wait for the next thing that is event of a call."""
        end = time.monotonic() + deadline_s
        while not self._received[number]:
            self._receive(end - time.monotonic())
        return self._received[number].popleft()

    def _send(self, **order: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    def _receive(self, patience_s: float) -> None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(patience_s, 0))
        assert ready, "a call went on for too long"
        data = os.read(self._process.stdout.fileno(), 2**20)
        assert data, "the calling process ended"
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            event = json.loads(line)
            self._received[event["id"]].append(event)


class Call:
    """One call that was begun."""

    def __init__(self, agent: Agent, number: int) -> None:
        """The agent's call of that number."""
        self._agent = agent
        self._number = number
        self._ended: Ended | None = None
        self.messages: list[bytes] = []

    def cancel(self) -> None:
        """Call it off."""
        self._agent.cancel_call(self._number)

    def events(self) -> Iterator[pb.ConvertResponse]:
        """The events of a conversion, as they come, until it ends."""
        while self._ended is None:
            heard = len(self.messages)
            self._take(waiting.DEADLINE_S)
            for data in self.messages[heard:]:
                yield pb.ConvertResponse.FromString(data)

    def await_event(self, wanted: Callable[[pb.ConvertResponse], bool]) -> pb.ConvertResponse:
        """Wait for an event.

        Raises:
            AssertionError: the call ended without.
        """
        for event in self.events():
            if wanted(event):
                return event
        raise AssertionError(f"the call ended without that event: {self._ended}")

    def await_started(self) -> pb.ConvertStarted:
        """Wait until the conversion is planned."""
        return self.await_event(lambda event: event.HasField("started")).started

    def await_queued(self) -> pb.ConvertProgress:
        """Wait until the conversion waits in the queue."""
        return self.await_event(lambda event: event.progress.phase == pb.PHASE_QUEUED).progress

    def message(self, deadline_s: float = waiting.DEADLINE_S) -> bytes:
        """Wait for the first message."""
        while not self.messages:
            assert self._ended is None, self._ended
            self._take(deadline_s)
        return self.messages[0]

    def end(self, deadline_s: float = waiting.DEADLINE_S) -> Ended:
        """Wait for the call's end."""
        while self._ended is None:
            self._take(deadline_s)
        return self._ended

    def refusal(self, deadline_s: float = waiting.DEADLINE_S) -> Refusal:
        """Wait for the call's end, which has to be a refusal."""
        return self.end(deadline_s).refusal()

    def result(self, deadline_s: float = waiting.DEADLINE_S) -> pb.ConvertResult:
        """Wait for the call's end, which has to be a success, and give the last event."""
        ended = self.end(deadline_s)
        assert ended.status == "OK", ended
        event = pb.ConvertResponse.FromString(self.messages[-1])
        assert event.HasField("result")
        return event.result

    def _take(self, deadline_s: float) -> None:
        event = self._agent.next(self._number, deadline_s)
        if "message" in event:
            self.messages.append(base64.b64decode(event["message"]))
            return
        self._ended = Ended(
            status=event["code"],
            message=event["text"],
            details=tuple(base64.b64decode(item) for item in event["details"]),
        )


def conversion(
    source: Path | str,
    dest: Path | str,
    *,
    source_format: str = "raw",
    dest_format: str = "qcow2",
    **fields: Any,  # noqa: ANN401 - the messages check their fields
) -> pb.ConvertRequest:
    """A request. Further fields are the destination's, or the request's own.

    One with a rate limit is meant to be slow, and so copies also where blocks could be shared.
    """
    own = {name: fields.pop(name) for name in _OF_REQUEST & fields.keys()}
    if "rate_limit_bytes_per_second" in own:
        own.setdefault("reflink", pb.REFLINK_NEVER)
    return pb.ConvertRequest(
        source=pb.Source(path=str(source), format=source_format),
        dest=pb.Destination(path=str(dest), format=dest_format, **fields),
        **own,
    )


_OF_REQUEST: Final = frozenset(pb.ConvertRequest.DESCRIPTOR.fields_by_name) - {"source", "dest"}
