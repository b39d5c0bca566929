"""A daemon of the contract that does what a request's label says: python fake_daemon.py SOCKET LOG.

It is a program of its own, since the tests' process must not load gRPC. Each line of the log is a
call that came, or how one ended.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from convertd.v1 import convert_pb2 as pb
from convertd.v1 import convert_pb2_grpc as pb_grpc

JOB_ID = "cafe01"
HOSTILE = "/images/\x1b[31mred\x07\n\u202eevil"
"""A name that would act on a terminal."""

Context = Any


class Fake(pb_grpc.ConvertServiceServicer):
    """The service."""

    def __init__(self, log: str) -> None:
        self.log = log
        self.cancelled = threading.Event()

    def note(self, text: str) -> None:
        """Add a line to the log."""
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def Convert(  # noqa: N802 - the contract's name
        self, request: pb.ConvertRequest, context: Context
    ) -> Iterator[pb.ConvertResponse]:
        """Do what the label says."""
        self.note(f"convert {request.label}")
        order, _, rest = request.label.partition(":")
        # Before the first event: a call that ends meanwhile never gets here again.
        if order in {"hang", "silent"} and not context.add_callback(self.end):
            self.end()
        if order == "silent":
            self.hang(context)
            return
        yield progress(pb.PHASE_QUEUED, queue_position=2)
        match order:
            case "hang":
                yield progress(pb.PHASE_CONVERTING, percent=40)
                self.hang(context)
            case "die":
                os._exit(9)
            case "finish":
                self.cancelled.wait()
                yield from conversion(request)
            case "no-result":
                return
            case "newer":
                yield pb.ConvertResponse.FromString(b"\xfa\x07\x02\x08\x01")
                yield progress(pb.Phase.ValueType(99))
                yield from conversion(request)
            case "refuse" | "bare" | "two" | "foreign":
                refuse(context, order, *rest.split(":"))
            case _:
                yield from conversion(request)

    def hang(self, context: Context) -> None:
        """Wait until the call ends, or the job is cancelled."""
        self.cancelled.wait()
        if context.is_active():
            refuse(context, "refuse", "CANCELLED", "CANCELLED_BY_CALLER")

    def end(self) -> None:
        """The call has ended, whoever ended it."""
        self.note("ended")
        self.cancelled.set()

    def CancelJob(  # noqa: N802 - the contract's name
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        """Cancel the job, or refuse if it is another's."""
        self.note(f"cancel {request.job_id}")
        if request.job_id != JOB_ID:
            refuse(context, "refuse", "NOT_FOUND", "JOB_NOT_FOUND")
        self.cancelled.set()
        return pb.CancelJobResponse(job=job())

    def ListJobs(  # noqa: N802 - the contract's name
        self, _: pb.ListJobsRequest, context: Context
    ) -> pb.ListJobsResponse:
        """List one job."""
        self.note("list")
        del context
        return pb.ListJobsResponse(jobs=[job()])

    def Inspect(  # noqa: N802 - the contract's name
        self, request: pb.InspectRequest, context: Context
    ) -> pb.InspectResponse:
        """Say of any image the same; of one whose name begins with a status, refuse."""
        name = request.source.path.rpartition("/")[2]
        if name.startswith("bare:"):
            refuse(context, *name.split(":"))
        answer = pb.InspectResponse(
            path=request.source.path,
            format=request.source.format or "qcow2",
            virtual_size_bytes=1 << 30,
            actual_size_bytes=3 << 20,
            cluster_size_bytes=1 << 16,
            backing_filename=HOSTILE,
            backing_format="raw",
            format_specific={"compat": "1.1"},
            qemu_img_json='{"format": "qcow2"}',
        )
        answer.snapshots.add(id="1", name="before").create_time.FromSeconds(1)
        answer.snapshots.add(id="2", name="after")
        answer.bitmaps.add(name="changed", granularity_bytes=1 << 16, flags=["auto"])
        answer.warnings.add(reason="IMAGE_IN_USE", message="somebody writes it")
        return answer

    def GetStats(  # noqa: N802 - the contract's name
        self, _: pb.GetStatsRequest, context: Context
    ) -> pb.GetStatsResponse:
        """No client asks."""
        raise NotImplementedError(context)

    def GetAccess(  # noqa: N802 - the contract's name
        self, _: pb.GetAccessRequest, context: Context
    ) -> pb.GetAccessResponse:
        """Say something of everything."""
        del context
        root = pb.GrantedRoot(
            name="images",
            path="/images",
            kind=pb.ROOT_KIND_FILE,
            access=pb.ROOT_ACCESS_CALLER,
            may_read=True,
        )
        grant = pb.Grant(
            rule="grants[0]",
            roots=[root],
            read_formats=["qcow2", "raw"],
            write_formats=["raw"],
            overwrite=pb.OVERWRITE_SCOPE_OWN,
        )
        return pb.GetAccessResponse(
            uid=4242,
            gid=4243,
            groups=[5, 6],
            is_operator=True,
            grants=[grant],
            versions=pb.Versions(daemon="9.9", qemu_img="7.2", landlock_abi=7, kernel="6.1"),
            compressions=[pb.COMPRESSION_ZLIB],
        )


def progress(
    phase: pb.Phase.ValueType, percent: int = 0, queue_position: int = 0
) -> pb.ConvertResponse:
    """A progress event, of an image of 100 MiB."""
    return pb.ConvertResponse(
        progress=pb.ConvertProgress(
            job_id=JOB_ID,
            phase=phase,
            queue_position=queue_position,
            percent=percent,
            bytes_done=percent << 20,
            bytes_total=100 << 20,
            elapsed_seconds=percent / 10,
        )
    )


def conversion(request: pb.ConvertRequest) -> Iterator[pb.ConvertResponse]:
    """The events of a conversion that succeeds."""
    cache = pb.CacheChoice(mode=pb.CACHE_MODE_NONE, reason="direct writes work")
    plan = pb.Plan(
        source_format="raw",
        dest_format=request.dest.format,
        dest_cache=cache,
        source_cache=cache,
        command=["qemu-img", "convert", request.source.path],
        chain=[pb.ImageMember(path=request.source.path, format="raw")],
        compression=pb.COMPRESSION_NONE,
        needed_bytes=10,
        available_bytes=2000,
        method=pb.METHOD_QEMU_IMG,
        method_reason="the disks differ",
    )
    yield pb.ConvertResponse(started=pb.ConvertStarted(job_id=JOB_ID, plan=plan))
    for percent in range(0, 101, 5):
        yield progress(pb.PHASE_CONVERTING, percent=percent)
    yield progress(pb.PHASE_FLUSHING, percent=100)
    result = pb.ConvertResult(
        job_id=JOB_ID,
        published=not request.validate_only,
        source_format="raw",
        dest_format=request.dest.format,
        virtual_size_bytes=100 << 20,
        allocated_size_bytes=50 << 20,
        dest_cache=cache,
        source_cache=cache,
        warnings=[pb.Warning(reason="SNAPSHOTS_DROPPED", message="2 snapshots are not in it")],
        elapsed_seconds=2,
        bytes_per_second=50 << 20,
        verified=request.verify,
        method=pb.METHOD_QEMU_IMG,
        written_bytes=50 << 20,
    )
    yield pb.ConvertResponse(result=result)


def job() -> pb.Job:
    """A job."""
    return pb.Job(
        job_id=JOB_ID,
        uid=4242,
        source_path=HOSTILE,
        dest_path="/images/b.raw",
        dest_format="raw",
        state=pb.JOB_STATE_QUEUED,
        label="nightly",
        progress=pb.ConvertProgress(job_id=JOB_ID, phase=pb.PHASE_QUEUED, queue_position=3),
    )


def refuse(context: Context, kind: str, status: str, reason: str = "") -> None:
    """End a call with a status, and as many ErrorInfos as the kind says."""
    domain = "elsewhere" if kind == "foreign" else "convertd"
    info = error_details_pb2.ErrorInfo(
        reason=reason, domain=domain, metadata={"path": HOSTILE, "free_bytes": "7"}
    )
    details = status_pb2.Status(code=grpc.StatusCode[status].value[0])
    for _ in range({"bare": 0, "two": 2}.get(kind, 1)):
        packed = any_pb2.Any()
        packed.Pack(info)
        details.details.append(packed)
    context.set_trailing_metadata((("grpc-status-details-bin", details.SerializeToString()),))
    context.abort(grpc.StatusCode[status], f"the fake refuses {HOSTILE}")


def main(socket: str, log: str) -> None:
    """Serve until killed."""
    server = grpc.server(futures.ThreadPoolExecutor(8))
    fake = Fake(log)
    pb_grpc.add_ConvertServiceServicer_to_server(fake, server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    os.chmod(socket, 0o666)  # noqa: S103 - for callers of any uid
    fake.note("serving")
    server.wait_for_termination()


if __name__ == "__main__":
    main(*sys.argv[1:])
