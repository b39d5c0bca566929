"""The calls of the contract: each becomes a message to the broker, and what comes back a reply."""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from convertd.v1 import convert_pb2 as pb
from convertd_daemon import channel, errors, model
from convertd_daemon.front import link, pipes, status, translate
from convertd_daemon.kernel import getrandom

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from convertd_daemon.front.link import Call, Link
    from convertd_daemon.front.relay import Relay

    Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger(__name__)

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

SERVICE: Final = "convertd.v1.ConvertService"

OPERATIONS: Final[Mapping[type[Any], channel.Operation]] = {
    pb.InspectRequest: channel.Operation.INSPECT,
    pb.ListJobsRequest: channel.Operation.LIST_JOBS,
    pb.CancelJobRequest: channel.Operation.CANCEL_JOB,
    pb.GetAccessRequest: channel.Operation.GET_ACCESS,
    pb.GetStatsRequest: channel.Operation.GET_STATS,
}


class Unparsable:
    """What stands in for a request that is no such message; its call is answered as any other."""


class ConvertService:
    """The service, over one link to the broker."""

    def __init__(self, broker: Link, relay: Relay) -> None:
        """Ask this broker, on behalf of the connections of this relay."""
        self.broker = broker
        self.relay = relay
        self.progress: dict[str, pb.ConvertProgress] = {}

    def handler(self) -> grpc.GenericRpcHandler:
        """The calls by name, as gRPC wants them."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Inspect": self._unary(self.inspect, pb.InspectRequest),
            "ListJobs": self._unary(self.list_jobs, pb.ListJobsRequest),
            "CancelJob": self._unary(self.cancel_job, pb.CancelJobRequest),
            "GetAccess": self._unary(self.get_access, pb.GetAccessRequest),
            "GetStats": self._unary(self.get_stats, pb.GetStatsRequest),
            "Convert": grpc.unary_stream_rpc_method_handler(
                self._convert,
                request_deserializer=_parser(pb.ConvertRequest),
                response_serializer=_serialize,
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _unary(
        self, method: Callable[[Q, int], Awaitable[R]], kind: type[Q]
    ) -> grpc.RpcMethodHandler[Q | Unparsable, R]:
        async def answer(request: Q | Unparsable, context: Context) -> R:
            try:
                return await method(_parsed(request), self._connection_of(context))
            except Exception as error:  # noqa: BLE001 - no traceback goes to a caller
                self._report(OPERATIONS[kind], context, error)
                await _fail(context, error)

        return grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=_parser(kind), response_serializer=_serialize
        )

    async def _convert(
        self, request: pb.ConvertRequest | Unparsable, context: Context
    ) -> AsyncIterator[pb.ConvertResponse]:
        try:
            events = self.convert(_parsed(request), self._connection_of(context))
            async for event in events:
                yield event
        except Exception as error:  # noqa: BLE001 - no traceback goes to a caller
            self._report(channel.Operation.CONVERT, context, error)
            await _fail(context, error)

    def _report(self, operation: channel.Operation, context: Context, error: Exception) -> None:
        """Tell the broker, who keeps the record, of a request that we refuse ourselves."""
        if isinstance(error, errors.ConvertError):
            number = self.relay.connection_of(context.peer()) or 0
            self.broker.send(
                channel.Rejected(connection=number, operation=operation, reason=error.reason)
            )

    def _connection_of(self, context: Context) -> int:
        """The broker's number for the connection of a call.

        Raises:
            errors.UnknownConnection: it came by no connection that the broker accepted.
        """
        number = self.relay.connection_of(context.peer())
        if number is None:
            raise errors.UnknownConnection
        return number

    async def convert(
        self, request: pb.ConvertRequest, connection: int
    ) -> AsyncIterator[pb.ConvertResponse]:
        """Convert: events as they come; whoever stops listening cancels the job."""
        secrets = translate.secrets(request)
        asked = translate.convert_request(request)
        make = functools.partial(_convert_message, connection, asked)
        with pipes.holding(secrets) as held, self.broker.call(make, held) as call:
            following = Following(time.monotonic())
            try:
                async for event in following.events(call):
                    self.progress[following.job_id] = following.progress
                    yield event
            finally:
                self.progress.pop(following.job_id, None)

    async def inspect(self, request: pb.InspectRequest, connection: int) -> pb.InspectResponse:
        """Inspect: one look at an image."""
        asked = translate.inspect_request(request)
        message = functools.partial(_inspect_message, connection, asked)
        with self.broker.call(message) as call:
            while True:
                said = await _next(call)
                if isinstance(said, channel.Inspected):
                    call.over = True
                    return translate.inspected(request.source.path, said)

    async def list_jobs(self, request: pb.ListJobsRequest, connection: int) -> pb.ListJobsResponse:
        """ListJobs: a page of the caller's own, or of all to an operator."""
        message = functools.partial(_list_message, connection, request)
        with self.broker.call(message) as call:
            answer = pb.ListJobsResponse()
            while isinstance(said := await _next(call), channel.JobEntry):
                answer.jobs.append(translate.job(said, self.progress.get(said.job_id)))
            if isinstance(said, channel.Done):
                answer.next_page_token = said.next_page_token
            return answer

    async def cancel_job(
        self, request: pb.CancelJobRequest, connection: int
    ) -> pb.CancelJobResponse:
        """CancelJob: one's own, or anybody's by an operator."""
        message = functools.partial(_cancel_message, connection, request.job_id)
        with self.broker.call(message) as call:
            jobs = [job async for job in self._jobs(call)]
            return pb.CancelJobResponse(job=jobs[0])

    async def _jobs(self, call: Call) -> AsyncIterator[pb.Job]:
        while isinstance(said := await _next(call), channel.JobEntry):
            yield translate.job(said, self.progress.get(said.job_id))

    async def get_access(
        self, _request: pb.GetAccessRequest, connection: int
    ) -> pb.GetAccessResponse:
        """GetAccess: who the caller is, and what it may do."""
        with self.broker.call(functools.partial(_access_message, connection)) as call:
            while not isinstance(report := await _next(call), channel.AccessReport):
                log.error("not an answer to GetAccess: %s", report)
            call.over = True
            return translate.access(report)

    async def get_stats(self, _request: pb.GetStatsRequest, connection: int) -> pb.GetStatsResponse:
        """GetStats: the counters, for operators."""
        with self.broker.call(functools.partial(_stats_message, connection)) as call:
            stats = pb.GetStatsResponse()
            bounds: tuple[float, ...] = ()
            while not isinstance(said := await _next(call), channel.Done):
                match said:
                    case channel.StatsReport(bounds=bounds):
                        stats.MergeFrom(translate.stats(said))
                    case channel.ConversionStats():
                        stats.conversions.append(translate.conversion_stats(said, bounds))
                    case channel.RefusalStats(reason=reason, count=count):
                        stats.refusals.add(reason=reason, count=count)
            return stats


class Following:
    """What one conversion has told so far, and the events that this makes."""

    def __init__(self, now: float) -> None:
        """A call that arrived `now`, in seconds of the monotonic clock."""
        self.arrived = now
        self.begun: float | None = None
        self.job_id = ""
        self.planned: model.Plan | None = None
        self.progress = pb.ConvertProgress()

    async def events(self, call: Call) -> AsyncIterator[pb.ConvertResponse]:
        """Turn what broker and job say into events, until the result.

        Raises:
            errors.ConvertError, Ends: the conversion ended otherwise.
        """
        while True:
            match await _next(call):
                case channel.Waiting(job_id=job_id, position=position):
                    self.job_id = job_id
                    # The contract counts those before it.
                    yield self._progressed(model.Phase.QUEUED, 0.0, position - 1)
                case channel.Progressed(progress=model.Progress(phase=phase, percent=percent)):
                    self._begin(call)
                    yield self._progressed(phase, percent, 0)
                case channel.Planned(plan=planned):
                    self._begin(call)
                    self.planned = planned
                    yield translate.started(self.job_id, planned)
                case channel.Succeeded(published=published):
                    self._begin(call)
                    call.over = True
                    call.finish()
                    yield translate.result(self.job_id, published, self._queued_s())
                    return

    def _begin(self, call: Call) -> None:
        self.job_id = call.job_id
        if self.begun is None:
            self.begun = time.monotonic()

    def _queued_s(self) -> float:
        return (self.begun or time.monotonic()) - self.arrived

    def _progressed(self, phase: model.Phase, percent: float, position: int) -> pb.ConvertResponse:
        total = self.planned.source.virtual_size_bytes if self.planned else 0
        self.progress = pb.ConvertProgress(
            job_id=self.job_id,
            phase=translate.PHASES[phase],
            queue_position=position,
            percent=percent,
            bytes_done=int(total * percent / 100),
            bytes_total=total,
            elapsed_seconds=time.monotonic() - self.arrived,
        )
        return pb.ConvertResponse(progress=self.progress)


class Ends(Exception):
    """A call ended with a condition that the broker or the job found."""

    def __init__(self, failure: errors.Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


async def _next(call: Call) -> object:
    """The next message about a call that is not its failure.

    Raises:
        Ends: it is.
        link.BrokerIsGone: nothing will come.
    """
    message = await call.next()
    failure = link.is_last(message)
    if failure is None:
        call.over = isinstance(message, channel.Done)
        return message
    call.over = not isinstance(message, channel.Failed)
    # A job that took too long says so while its qemu-img, which may be stuck, still lives.
    if not call.over and failure.status is not errors.Status.DEADLINE_EXCEEDED:
        call.finish()
    raise Ends(failure)


async def _fail(context: Context, error: Exception) -> NoReturn:
    """End a call as the table of conditions says; whatever is not in it is a bug."""
    match error:
        case grpc.aio.AbortError():
            raise error
        case Ends(failure=failure):
            await status.abort(context, failure)
        case errors.ConvertError():
            await status.abort(context, error.failure())
        case channel.TooLong():
            await status.abort(context, errors.BadMessage(problem="it is too long").failure())
        case link.BrokerIsGone():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the daemon ended")
        case _:
            error_id = getrandom.hex_name(6)
            log.error("internal error id=%s", error_id, exc_info=error)
            await status.abort(context, errors.InternalError(error_id=error_id).failure())


def _parser(kind: type[Q]) -> Callable[[bytes], Q | Unparsable]:
    """Give what parses a request. gRPC answers bytes that are none with UNKNOWN and no reason."""

    def parse(data: bytes) -> Q | Unparsable:
        try:
            return kind.FromString(data)
        except DecodeError:
            return Unparsable()

    return parse


def _parsed(request: Q | Unparsable) -> Q:
    """The request, if it is one.

    Raises:
        errors.BadMessage: it is not.
    """
    if isinstance(request, Unparsable):
        raise errors.BadMessage(problem="it is not the protobuf message of this call")
    return request


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _convert_message(connection: int, request: model.ConvertRequest, call: int) -> object:
    return channel.Convert(call=call, connection=connection, request=request)


def _inspect_message(connection: int, request: model.InspectRequest, call: int) -> object:
    return channel.Inspect(call=call, connection=connection, request=request)


def _list_message(connection: int, request: pb.ListJobsRequest, call: int) -> object:
    return channel.ListJobs(
        call=call,
        connection=connection,
        page_size=request.page_size,
        page_token=request.page_token,
    )


def _cancel_message(connection: int, job_id: str, call: int) -> object:
    return channel.CancelJob(call=call, connection=connection, job_id=job_id)


def _access_message(connection: int, call: int) -> object:
    return channel.GetAccess(call=call, connection=connection)


def _stats_message(connection: int, call: int) -> object:
    return channel.GetStats(call=call, connection=connection)
