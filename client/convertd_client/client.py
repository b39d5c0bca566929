"""The daemon's client for synchronous code."""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Callable, Iterator
from typing import Self, TypeVar, Unpack

import grpc

from convertd.v1 import convert_pb2 as pb
from convertd.v1 import convert_pb2_grpc as pb_grpc
from convertd_client import (
    call_errors,
    conversion,
    errors,
    results,
    signal_safe_call,
    sockets,
    to_proto,
)
from convertd_core import proto_mapping

Request = TypeVar("Request")
Response = TypeVar("Response")
Call = TypeVar("Call", bound=grpc.Call)


class Client:
    """A connection to the daemon.

    `socket` is the daemon's socket; by default $CONVERTD_SOCKET, else /run/convertd/convertd.sock.
    `wait_for_ready` is how many seconds a call waits for a daemon that does not listen, for example
    while it restarts; 0 fails at once. Each call can override it. A call that reached a daemon is
    never repeated.

    Use it as a context manager, or close it. Any number of threads may share one. It connects at
    the first call, as the process and uid that make it: make a new one after fork or a change of
    uid.
    """

    def __init__(
        self,
        socket: str | os.PathLike[str] | None = None,
        *,
        wait_for_ready: float = sockets.DEFAULT_WAIT_S,
    ) -> None:
        self.socket = sockets.path_of(socket)
        self._wait_s = wait_for_ready
        self._channel = grpc.insecure_channel(
            to_proto.target(self.socket), to_proto.CHANNEL_OPTIONS
        )
        self._stub = pb_grpc.ConvertServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. Running conversions are cancelled."""
        self._channel.close()

    def convert(  # noqa: PLR0913 - most arguments are optional
        self,
        source: conversion.Path,
        dest: conversion.Path,
        *,
        dest_format: str,
        on_progress: Callable[[results.Progress], None] | None = None,
        timeout: float | None = None,
        wait_for_ready: float | None = None,
        **options: Unpack[conversion.ConvertOptions],
    ) -> results.ConvertResult:
        """Convert the image `source` into a new image `dest`, which appears complete or not at all.

        Paths are absolute. `on_progress` is called in this thread. `timeout` is in seconds, and
        includes the time in the queue; None means no limit. To leave the call in any way, Ctrl-C
        and an exception of `on_progress` included, cancels the job. The options are those of
        `conversion.ConvertOptions`.

        Raises:
            errors.ConvertError: see `errors`.
        """
        request = to_proto.convert_request(conversion.asked(source, dest, dest_format, options))
        reading = to_proto.Reading(on_progress)
        waiting = self._waiting(wait_for_ready)
        with waiting.watch(
            lambda: self._stub.Convert(request, timeout=timeout, wait_for_ready=waiting.allowed),
            converting=True,
        ) as call:
            for response in call:
                waiting.end()
                reading.take(response)
        return reading.result()

    def inspect(
        self,
        path: conversion.Path,
        format: str | None = None,  # noqa: A002 - the contract's word, and Nova's
        *,
        timeout: float | None = sockets.DEFAULT_TIMEOUT_S,
        wait_for_ready: float | None = None,
    ) -> results.ImageInfo:
        """Describe the image at `path`. Only its headers are read.

        Raises:
            errors.ConvertError: see `errors`.
        """
        request = to_proto.inspect_request(conversion.path_text("source.path", path), format or "")
        answer = self._answer(self._stub.Inspect, request, timeout, wait_for_ready)
        return proto_mapping.from_message(results.ImageInfo, answer)

    def jobs(
        self,
        *,
        timeout: float | None = sockets.DEFAULT_TIMEOUT_S,
        wait_for_ready: float | None = None,
    ) -> tuple[results.Job, ...]:
        """List the caller's conversions that wait or run, oldest first; an operator's: all.

        Raises:
            errors.ConvertError: see `errors`.
        """
        request, listed = pb.ListJobsRequest(), list[results.Job]()
        while True:
            answer = self._answer(self._stub.ListJobs, request, timeout, wait_for_ready)
            listed += (proto_mapping.from_message(results.Job, job) for job in answer.jobs)
            if not answer.next_page_token:
                return tuple(listed)
            request.page_token = answer.next_page_token

    def cancel(
        self,
        job_id: str,
        *,
        timeout: float | None = sockets.DEFAULT_TIMEOUT_S,
        wait_for_ready: float | None = None,
    ) -> results.Job:
        """Cancel a job, and return its state. Does not wait for its end.

        Raises:
            errors.NotFound: there is no such job, or it belongs to another user.
            errors.ConvertError: see `errors`.
        """
        request = pb.CancelJobRequest(job_id=job_id)
        answer = self._answer(self._stub.CancelJob, request, timeout, wait_for_ready)
        return proto_mapping.from_message(results.Job, answer.job)

    def access(
        self,
        *,
        timeout: float | None = sockets.DEFAULT_TIMEOUT_S,
        wait_for_ready: float | None = None,
    ) -> results.Access:
        """Return the caller's identity, as the daemon sees it, and its grants.

        Raises:
            errors.ConvertError: see `errors`.
        """
        request = pb.GetAccessRequest()
        answer = self._answer(self._stub.GetAccess, request, timeout, wait_for_ready)
        return proto_mapping.from_message(results.Access, answer)

    def _answer(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        timeout_s: float | None,
        wait_s: float | None,
    ) -> Response:
        waiting = self._waiting(wait_s)
        with waiting.watch(
            lambda: method.future(request, timeout=timeout_s, wait_for_ready=waiting.allowed),
            converting=False,
        ) as call:
            return call.result()

    def _waiting(self, wait_s: float | None) -> _Waiting:
        refused = sockets.refusal(self.socket)
        if refused is not None:
            raise refused
        return _Waiting(self._channel, self.socket, self._wait_s if wait_s is None else wait_s)


class _Waiting:
    """Limits how long a call waits for a daemon that does not listen.

    gRPC delays a call until there is a connection, limited only by the call's deadline. So the
    call is made once, and cancelled if there is no connection after `wait_s`. gRPC is asked for
    its connection only then.
    """

    def __init__(self, channel: grpc.Channel, path: str, wait_s: float) -> None:
        self._channel = channel
        self._path = path
        self._wait_s = wait_s
        self._is_answered = False
        # Not threading.Event, which is Python code that Ctrl-C can interrupt halfway.
        self._over: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._called_off = False

    @property
    def allowed(self) -> bool:
        """Whether the call may wait at all."""
        return self._wait_s > 0

    def end(self) -> None:
        """End the wait: the daemon has answered."""
        if not self._is_answered:
            self._is_answered = True
            self._over.put(None)

    @contextlib.contextmanager
    def watch(self, make: Callable[[], Call], *, converting: bool) -> Iterator[Call]:
        """Begin a call, convert its failure to a ConvertError, and cancel it at the end."""
        with signal_safe_call.begun(make) as call, contextlib.ExitStack() as stack:
            stack.callback(self._over.put, None)
            if self.allowed:
                signal_safe_call.thread(self._call_off, call)
            try:
                yield call
            except (grpc.RpcError, grpc.FutureCancelledError) as error:
                raise self._error(call, converting=converting) from error

    def _call_off(self, call: grpc.Call) -> None:
        try:
            self._over.get(timeout=self._wait_s)
        except queue.Empty:
            if not self._is_connected():
                self._called_off = True
                call.cancel()

    def _is_connected(self) -> bool:
        states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
        on_state = states.put
        self._channel.subscribe(on_state)
        try:
            return states.get() is grpc.ChannelConnectivity.READY
        finally:
            self._channel.unsubscribe(on_state)

    def _error(self, call: grpc.Call, *, converting: bool) -> errors.ConvertError:
        return call_errors.error(
            call_errors.Ending(
                socket=self._path,
                code=call.code(),
                text=call.details() or "",
                metadata=tuple(call.trailing_metadata() or ()),
                converting=converting,
                answered=self._is_answered,
                called_off=self._called_off,
            )
        )
