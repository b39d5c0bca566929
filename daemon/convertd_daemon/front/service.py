"""The calls of the contract: each becomes a message to the broker, whose reply it returns."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message

from convertd.v1 import convert_pb2 as pb
from convertd_core import conditions, messages, proto_mapping, results
from convertd_daemon import channel
from convertd_daemon.front import (
    broker_link,
    error_status,
    secret_pipes,
    translate,
)
from convertd_daemon.linux import getrandom

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from convertd_daemon.front.broker_link import BrokerLink, Call
    from convertd_daemon.front.relay import Relay

    Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

SERVICE: Final = "convertd.v1.ConvertService"


class UnparsableRequest:
    """The stand-in for a request that can't be parsed; its call is refused like any other."""


class ConvertService:
    """The service, over one link to the broker."""

    def __init__(self, broker: BrokerLink, relay: Relay) -> None:
        """Ask this broker, on behalf of the connections of this relay."""
        self.broker = broker
        self.relay = relay
        self.progress: dict[str, pb.ConvertProgress] = {}

    def handler(self) -> grpc.GenericRpcHandler:
        """The calls by name, as gRPC wants them."""
        asked = messages.Operation
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Inspect": self._unary(self.inspect, pb.InspectRequest, asked.INSPECT),
            "ListJobs": self._unary(self.list_jobs, pb.ListJobsRequest, asked.LIST_JOBS),
            "CancelJob": self._unary(self.cancel_job, pb.CancelJobRequest, asked.CANCEL_JOB),
            "GetAccess": self._unary(self.get_access, pb.GetAccessRequest, asked.GET_ACCESS),
            "GetStats": self._unary(self.get_stats, pb.GetStatsRequest, asked.GET_STATS),
            "Convert": grpc.unary_stream_rpc_method_handler(
                self._convert,
                request_deserializer=_parser(pb.ConvertRequest),
                response_serializer=_serialize,
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _unary(
        self, method: Callable[[Q, int], Awaitable[R]], kind: type[Q], operation: messages.Operation
    ) -> grpc.RpcMethodHandler[Q | UnparsableRequest, R]:
        async def answer(request: Q | UnparsableRequest, context: Context) -> R:
            try:
                return await method(_parsed(request), self._connection_of(context))
            except Exception as error:  # noqa: BLE001 - no traceback goes to a caller
                self._report(operation, context, error)
                await _fail(context, error)

        return grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=_parser(kind), response_serializer=_serialize
        )

    async def _convert(
        self, request: pb.ConvertRequest | UnparsableRequest, context: Context
    ) -> AsyncIterator[pb.ConvertResponse]:
        try:
            events = self.convert(_parsed(request), self._connection_of(context))
            async for event in events:
                yield event
        except Exception as error:  # noqa: BLE001 - no traceback goes to a caller
            self._report(messages.Operation.CONVERT, context, error)
            await _fail(context, error)

    def _report(self, operation: messages.Operation, context: Context, error: Exception) -> None:
        """Tell the broker, who keeps the record, of a request that we refuse ourselves."""
        if isinstance(error, conditions.ConvertError):
            number = self.relay.connection_of(context.peer()) or 0
            self.broker.send(
                messages.RequestRejected(
                    connection=number, operation=operation, reason=error.reason
                )
            )

    def _connection_of(self, context: Context) -> int:
        """The broker's number for the connection of a call.

        Raises:
            conditions.UnknownConnection: it came by no connection that the broker accepted.
        """
        number = self.relay.connection_of(context.peer())
        if number is None:
            raise conditions.UnknownConnection
        return number

    async def convert(
        self, request: pb.ConvertRequest, connection: int
    ) -> AsyncIterator[pb.ConvertResponse]:
        """Convert: yield events as they arrive; closing the generator cancels the job."""
        secrets = translate.secrets(request)
        asked = translate.convert_request(request)
        with (
            secret_pipes.holding(secrets) as held,
            self.broker.call(connection, asked, held) as call,
        ):
            following = ConversionEvents(time.monotonic())
            try:
                async for event in following.events(call):
                    self.progress[following.job_id] = following.progress
                    yield event
            finally:
                self.progress.pop(following.job_id, None)

    async def inspect(self, request: pb.InspectRequest, connection: int) -> pb.InspectResponse:
        """Inspect: describe an image."""
        with self.broker.call(connection, translate.inspect_request(request)) as call:
            while not isinstance(message := await _next(call), messages.Inspected):
                pass
            call.over = True
            return _message_of(message.image, pb.InspectResponse())

    async def list_jobs(self, request: pb.ListJobsRequest, connection: int) -> pb.ListJobsResponse:
        """ListJobs: a page of the caller's own, or of all to an operator."""
        asked = messages.ListJobs(page_size=request.page_size, page_token=request.page_token)
        *jobs, complete = await self._ask(connection, asked)
        return pb.ListJobsResponse(
            jobs=map(self._job, jobs), next_page_token=complete.next_page_token
        )

    async def cancel_job(
        self, request: pb.CancelJobRequest, connection: int
    ) -> pb.CancelJobResponse:
        """CancelJob: a job of the caller, or any job for an operator."""
        job, _ = await self._ask(connection, messages.CancelJob(job_id=request.job_id))
        return pb.CancelJobResponse(job=self._job(job))

    def _job(self, job: results.Job) -> pb.Job:
        return translate.job(job, self.progress.get(job.job_id))

    async def get_access(
        self, _request: pb.GetAccessRequest, connection: int
    ) -> pb.GetAccessResponse:
        """GetAccess: who the caller is, and what it may do."""
        access, _ = await self._ask(connection, messages.GetAccess())
        return _message_of(access, pb.GetAccessResponse())

    async def get_stats(self, _request: pb.GetStatsRequest, connection: int) -> pb.GetStatsResponse:
        """GetStats: the counters, for operators."""
        report, *counts, _ = await self._ask(connection, messages.GetStats())
        stats = _message_of(report, pb.GetStatsResponse())
        for counted in counts:
            if isinstance(counted, messages.ConversionStats):
                _message_of(counted, stats.conversions.add())
            else:
                _message_of(counted, stats.refusals.add())
        return stats

    async def _ask(self, connection: int, body: messages.RequestBody) -> list[Any]:
        """Ask for what has no job, and give all that answers it; the last is a ReplyComplete."""
        replies = []
        with self.broker.call(connection, body) as call:
            while not call.over:
                replies.append(await _next(call))
        return replies


class ConversionEvents:
    """The messages of one conversion, turned into events of the contract."""

    def __init__(self, now: float) -> None:
        """A call that arrived `now`, in seconds of the monotonic clock."""
        self.arrived = now
        self.begun: float | None = None
        self.job_id = ""
        self.planned: results.Plan | None = None
        self.progress = pb.ConvertProgress()

    async def events(self, call: Call) -> AsyncIterator[pb.ConvertResponse]:
        """Turn the messages of broker and job into events, until the result.

        Raises:
            conditions.ConvertError, Ends: the conversion ended otherwise.
        """
        while True:
            match await _next(call):
                case messages.Queued(job_id=job_id, position=position):
                    self.job_id = job_id
                    # The contract counts those before it.
                    queued = results.Progress(
                        phase=results.Phase.QUEUED, queue_position=position - 1
                    )
                    yield self._progressed(queued)
                case messages.Progressed(progress=progress):
                    self._begin(call)
                    yield self._progressed(progress)
                case messages.Planned(plan=planned):
                    self._begin(call)
                    self.planned = planned
                    yield translate.started(self.job_id, planned)
                case messages.Succeeded(result=result):
                    self._begin(call)
                    call.over = True
                    call.finish()
                    yield translate.result(self.job_id, result, self._queued_s())
                    return

    def _begin(self, call: Call) -> None:
        self.job_id = call.job_id
        if self.begun is None:
            self.begun = time.monotonic()

    def _queued_s(self) -> float:
        return (self.begun or time.monotonic()) - self.arrived

    def _progressed(self, reported: results.Progress) -> pb.ConvertResponse:
        total = self.planned.virtual_size_bytes if self.planned else 0
        progress = dataclasses.replace(
            reported,
            job_id=self.job_id,
            bytes_done=int(total * reported.percent / 100),
            bytes_total=total,
            elapsed_seconds=time.monotonic() - self.arrived,
        )
        self.progress = _message_of(progress, pb.ConvertProgress())
        return pb.ConvertResponse(progress=self.progress)


class CallFailed(Exception):
    """A call ended with a condition that the broker or the job found."""

    def __init__(self, failure: conditions.Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


async def _next(call: Call) -> object:
    """The next message about a call that is not its failure.

    Raises:
        Ends: it is.
        link.BrokerIsGone: nothing will come.
    """
    message = await call.next()
    failure = broker_link.is_last(message)
    if failure is None:
        call.over = isinstance(message, messages.ReplyComplete)
        return message
    call.over = not isinstance(message, messages.Failed)
    # A job that took too long reports that while its qemu-img, which may be stuck, still runs.
    if not call.over and failure.status is not conditions.Status.DEADLINE_EXCEEDED:
        call.finish()
    raise CallFailed(failure)


async def _fail(context: Context, error: Exception) -> NoReturn:
    """End a call with the status of its condition; any other exception is a bug."""
    match error:
        case grpc.aio.AbortError():
            raise error
        case CallFailed(failure=failure):
            await error_status.abort(context, failure)
        case conditions.ConvertError():
            await error_status.abort(context, error.failure())
        case channel.TooLong():
            await error_status.abort(
                context, conditions.BadMessage(problem="it is too long").failure()
            )
        case broker_link.BrokerIsGone():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the daemon ended")
        case _:
            error_id = getrandom.hex_name(6)
            log.error("internal error id=%s", error_id, exc_info=error)
            await error_status.abort(context, conditions.InternalError(error_id=error_id).failure())


def _parser(kind: type[Q]) -> Callable[[bytes], Q | UnparsableRequest]:
    """Give what parses a request. gRPC answers bytes that are none with UNKNOWN and no reason."""

    def parse(data: bytes) -> Q | UnparsableRequest:
        try:
            return kind.FromString(data)
        except DecodeError:
            return UnparsableRequest()

    return parse


def _parsed(request: Q | UnparsableRequest) -> Q:
    """The request, if it is one.

    Raises:
        conditions.BadMessage: it is not.
    """
    if isinstance(request, UnparsableRequest):
        raise conditions.BadMessage(problem="it is not the protobuf message of this call")
    return request


def _message_of(value: object, message: R) -> R:
    """The message, filled from a value. See proto_mapping."""
    return cast("R", proto_mapping.to_message(value, message))


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
