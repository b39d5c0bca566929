"""The daemon's client for asyncio. See `client`, the same for synchronous code."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Self, TypeVar, Unpack

import grpc
import grpc.aio

from convertd.v1 import convert_pb2 as pb
from convertd.v1 import convert_pb2_grpc as pb_grpc
from convertd_client import (
    call_errors,
    conversion,
    errors,
    results,
    sockets,
    to_proto,
)
from convertd_core import proto_mapping

Request = TypeVar("Request")
Response = TypeVar("Response")


class AsyncClient:
    """A connection to the daemon, for one event loop.

    As `Client`, but for asyncio: cancelling the task that awaits a conversion cancels the job.
    """

    def __init__(
        self,
        socket: str | os.PathLike[str] | None = None,
        *,
        wait_for_ready: float = sockets.DEFAULT_WAIT_S,
    ) -> None:
        self.socket = sockets.path_of(socket)
        self._wait_s = wait_for_ready
        self._opened: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect. Running conversions are cancelled."""
        if self._opened is not None:
            await self._opened.close()

    async def convert(  # noqa: PLR0913 - most arguments are optional
        self,
        source: conversion.Path,
        dest: conversion.Path,
        *,
        dest_format: str,
        on_progress: Callable[[results.Progress], None] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - it goes to the daemon with the call
        wait_for_ready: float | None = None,
        **options: Unpack[conversion.ConvertOptions],
    ) -> results.ConvertResult:
        """Convert the image `source` into a new image `dest`, which appears complete or not at all.

        See `Client.convert`. `on_progress` is a plain function, called in the event loop.

        Raises:
            errors.ConvertError: see `errors`.
        """
        request = to_proto.convert_request(conversion.asked(source, dest, dest_format, options))
        reading = to_proto.Reading(on_progress)
        waiting = self._waiting(wait_for_ready)
        call = self._stub.Convert(request, timeout=timeout, wait_for_ready=waiting.allowed)
        async with waiting.watch(call, converting=True):
            async for response in call:
                waiting.end()
                reading.take(response)
        return reading.result()

    async def inspect(
        self,
        path: conversion.Path,
        format: str | None = None,  # noqa: A002 - the contract's word, and Nova's
        *,
        timeout: float | None = sockets.DEFAULT_TIMEOUT_S,  # noqa: ASYNC109 - see convert
        wait_for_ready: float | None = None,
    ) -> results.ImageInfo:
        """Describe the image at `path`. Only its headers are read.

        Raises:
            errors.ConvertError: see `errors`.
        """
        request = to_proto.inspect_request(conversion.path_text("source.path", path), format or "")
        answer = await self._answer(self._stub.Inspect, request, timeout, wait_for_ready)
        return proto_mapping.from_message(results.ImageInfo, answer)

    async def jobs(
        self,
        *,
        timeout: float | None = sockets.DEFAULT_TIMEOUT_S,  # noqa: ASYNC109 - see convert
        wait_for_ready: float | None = None,
    ) -> tuple[results.Job, ...]:
        """List the caller's conversions that wait or run, oldest first; an operator's: all.

        Raises:
            errors.ConvertError: see `errors`.
        """
        request, listed = pb.ListJobsRequest(), list[results.Job]()
        while True:
            answer = await self._answer(self._stub.ListJobs, request, timeout, wait_for_ready)
            listed += (proto_mapping.from_message(results.Job, job) for job in answer.jobs)
            if not answer.next_page_token:
                return tuple(listed)
            request.page_token = answer.next_page_token

    async def cancel(
        self,
        job_id: str,
        *,
        timeout: float | None = sockets.DEFAULT_TIMEOUT_S,  # noqa: ASYNC109 - see convert
        wait_for_ready: float | None = None,
    ) -> results.Job:
        """Cancel a job, and return its state. Does not wait for its end.

        Raises:
            errors.NotFound: there is no such job, or it belongs to another user.
            errors.ConvertError: see `errors`.
        """
        request = pb.CancelJobRequest(job_id=job_id)
        answer = await self._answer(self._stub.CancelJob, request, timeout, wait_for_ready)
        return proto_mapping.from_message(results.Job, answer.job)

    async def access(
        self,
        *,
        timeout: float | None = sockets.DEFAULT_TIMEOUT_S,  # noqa: ASYNC109 - see convert
        wait_for_ready: float | None = None,
    ) -> results.Access:
        """Return the caller's identity, as the daemon sees it, and its grants.

        Raises:
            errors.ConvertError: see `errors`.
        """
        request = pb.GetAccessRequest()
        answer = await self._answer(self._stub.GetAccess, request, timeout, wait_for_ready)
        return proto_mapping.from_message(results.Access, answer)

    @property
    def _channel(self) -> grpc.aio.Channel:
        # Not before the first call: gRPC binds a channel to the event loop that runs then.
        if self._opened is None:
            self._opened = grpc.aio.insecure_channel(
                to_proto.target(self.socket), to_proto.CHANNEL_OPTIONS
            )
        return self._opened

    @property
    def _stub(self) -> pb_grpc.ConvertServiceAsyncStub:
        return pb_grpc.ConvertServiceStub(self._channel)

    async def _answer(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout_s: float | None,
        wait_s: float | None,
    ) -> Response:
        waiting = self._waiting(wait_s)
        call = method(request, timeout=timeout_s, wait_for_ready=waiting.allowed)
        async with waiting.watch(call, converting=False):
            return await call

    def _waiting(self, wait_s: float | None) -> _Waiting:
        refused = sockets.refusal(self.socket)
        if refused is not None:
            raise refused
        return _Waiting(self._channel, self.socket, self._wait_s if wait_s is None else wait_s)


class _Waiting:
    """Limits how long a call waits for a daemon that does not listen. As the one in `client`."""

    def __init__(self, channel: grpc.aio.Channel, path: str, wait_s: float) -> None:
        self._channel = channel
        self._path = path
        self._wait_s = wait_s
        self._answered = False
        self._called_off = False

    @property
    def allowed(self) -> bool:
        """Whether the call may wait at all."""
        return self._wait_s > 0

    def end(self) -> None:
        """End the wait: the daemon has answered."""
        self._answered = True

    @contextlib.asynccontextmanager
    async def watch(self, call: grpc.aio.Call, *, converting: bool) -> AsyncIterator[None]:
        """Run the block, convert the call's failure to a ConvertError, and cancel it at the end."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._wait_s, self._call_off, call) if self.allowed else None
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise await self._error(call, converting=converting) from error
        except asyncio.CancelledError:
            # gRPC raises this also in a task whose call we cancelled. If the task itself was
            # cancelled, the exception must propagate.
            task = asyncio.current_task()
            if not self._called_off or (task is not None and task.cancelling()):
                raise
            raise await self._error(call, converting=converting) from None
        finally:
            call.cancel()
            if timer is not None:
                timer.cancel()

    def _call_off(self, call: grpc.aio.Call) -> None:
        connected = self._channel.get_state() is grpc.ChannelConnectivity.READY
        if not self._answered and not connected:
            self._called_off = True
            call.cancel()

    async def _error(self, call: grpc.aio.Call, *, converting: bool) -> errors.ConvertError:
        ended = call_errors.Ending(
            socket=self._path,
            code=await call.code(),
            text=await call.details() or "",
            metadata=tuple(await call.trailing_metadata() or ()),
            converting=converting,
            answered=self._answered,
            called_off=self._called_off,
        )
        # In a thread: it may have to wait for a daemon that does not accept.
        return await asyncio.to_thread(call_errors.error, ended)
