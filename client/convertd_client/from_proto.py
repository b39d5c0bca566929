"""From the contract's messages to our values, for both clients."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Final

from google.protobuf import timestamp_pb2

from convertd.v1 import convert_pb2 as pb
from convertd_client import results

# Each enum by its number. A number that is not there comes from a newer daemon.
_CACHE_MODES: Final = {
    pb.CacheMode.Value(f"CACHE_MODE_{item.name}"): item for item in results.CacheMode
}
_COMPRESSIONS: Final = {
    pb.Compression.Value(f"COMPRESSION_{item.name}"): item for item in results.Compression
}
_PHASES: Final = {pb.Phase.Value(f"PHASE_{item.name}"): item for item in results.Phase}
_STATES: Final = {pb.JobState.Value(f"JOB_STATE_{item.name}"): item for item in results.JobState}
_KINDS: Final = {pb.RootKind.Value(f"ROOT_KIND_{item.name}"): item for item in results.RootKind}
_ACCESSES: Final = {
    pb.RootAccess.Value(f"ROOT_ACCESS_{item.name}"): item for item in results.RootAccess
}
_OVERWRITES: Final = {
    pb.OverwriteScope.Value(f"OVERWRITE_SCOPE_{item.name}"): item for item in results.OverwriteScope
}


def progress(message: pb.ConvertProgress) -> results.Progress:
    """How far a conversion is."""
    return results.Progress(
        job_id=message.job_id,
        phase=_PHASES.get(message.phase, results.Phase.UNSPECIFIED),
        queue_position=message.queue_position,
        percent=message.percent,
        bytes_done=message.bytes_done,
        bytes_total=message.bytes_total,
        elapsed_seconds=message.elapsed_seconds,
    )


def plan(message: pb.Plan) -> results.Plan:
    """How a conversion will be done."""
    return results.Plan(
        source_format=message.source_format,
        dest_format=message.dest_format,
        virtual_size_bytes=message.virtual_size_bytes,
        dest_cache=_cache(message.dest_cache),
        source_cache=_cache(message.source_cache),
        command=tuple(message.command),
        chain=_members(message.chain),
        compression=_COMPRESSIONS.get(message.compression, results.Compression.UNSPECIFIED),
        needed_bytes=message.needed_bytes,
        available_bytes=message.available_bytes,
    )


def result(message: pb.ConvertResult, planned: results.Plan | None) -> results.ConvertResult:
    """What was done, and how."""
    return results.ConvertResult(
        job_id=message.job_id,
        published=message.published,
        source_format=message.source_format,
        dest_format=message.dest_format,
        virtual_size_bytes=message.virtual_size_bytes,
        allocated_size_bytes=message.allocated_size_bytes,
        dest_cache=_cache(message.dest_cache),
        source_cache=_cache(message.source_cache),
        warnings=_notices(message.warnings),
        elapsed_seconds=message.elapsed_seconds,
        queued_seconds=message.queued_seconds,
        bytes_per_second=message.bytes_per_second,
        verified=message.verified,
        replaced=message.replaced,
        plan=planned,
    )


def image(message: pb.InspectResponse) -> results.ImageInfo:
    """What an image is."""
    return results.ImageInfo(
        path=message.path,
        format=message.format,
        virtual_size_bytes=message.virtual_size_bytes,
        actual_size_bytes=message.actual_size_bytes,
        cluster_size_bytes=message.cluster_size_bytes,
        encrypted=message.encrypted,
        dirty=message.dirty,
        corrupt=message.corrupt,
        compressed=message.compressed,
        backing_filename=message.backing_filename,
        backing_format=message.backing_format,
        backing_chain=_members(message.backing_chain),
        backing_chain_complete=message.backing_chain_complete,
        snapshots=tuple(_snapshot(item) for item in message.snapshots),
        bitmaps=tuple(_bitmap(item) for item in message.bitmaps),
        format_specific=dict(message.format_specific),
        qemu_img_json=message.qemu_img_json,
        warnings=_notices(message.warnings),
    )


def job(message: pb.Job) -> results.Job:
    """A conversion that waits or runs."""
    return results.Job(
        job_id=message.job_id,
        uid=message.uid,
        source_path=message.source_path,
        source_format=message.source_format,
        dest_path=message.dest_path,
        dest_format=message.dest_format,
        state=_STATES.get(message.state, results.JobState.UNSPECIFIED),
        label=message.label,
        progress=progress(message.progress),
        create_time=_time(message.create_time) if message.HasField("create_time") else None,
        start_time=_time(message.start_time) if message.HasField("start_time") else None,
    )


def access(message: pb.GetAccessResponse) -> results.Access:
    """Whom the daemon takes the caller for, and what that caller may do."""
    return results.Access(
        uid=message.uid,
        gid=message.gid,
        groups=tuple(message.groups),
        is_operator=message.is_operator,
        grants=tuple(_grant(item) for item in message.grants),
        limits=_limits(message.limits),
        versions=results.Versions(
            daemon=message.versions.daemon,
            qemu_img=message.versions.qemu_img,
            landlock_abi=message.versions.landlock_abi,
            kernel=message.versions.kernel,
        ),
        source_formats=tuple(message.source_formats),
        dest_formats=tuple(message.dest_formats),
        compressions=tuple(
            _COMPRESSIONS.get(item, results.Compression.UNSPECIFIED)
            for item in message.compressions
        ),
    )


def _cache(message: pb.CacheChoice) -> results.CacheChoice:
    mode = _CACHE_MODES.get(message.mode, results.CacheMode.UNSPECIFIED)
    return results.CacheChoice(mode=mode, reason=message.reason)


def _members(messages: Iterable[pb.ImageMember]) -> tuple[results.ImageMember, ...]:
    return tuple(
        results.ImageMember(
            path=item.path,
            format=item.format,
            virtual_size_bytes=item.virtual_size_bytes,
            actual_size_bytes=item.actual_size_bytes,
            encrypted=item.encrypted,
        )
        for item in messages
    )


def _notices(messages: Iterable[pb.Warning]) -> tuple[results.Warning, ...]:
    return tuple(results.Warning(reason=item.reason, message=item.message) for item in messages)


def _snapshot(message: pb.Snapshot) -> results.Snapshot:
    return results.Snapshot(
        id=message.id,
        name=message.name,
        vm_state_size_bytes=message.vm_state_size_bytes,
        create_time=_time(message.create_time) if message.HasField("create_time") else None,
        vm_clock_seconds=message.vm_clock_seconds,
    )


def _bitmap(message: pb.Bitmap) -> results.Bitmap:
    return results.Bitmap(
        name=message.name,
        granularity_bytes=message.granularity_bytes,
        flags=tuple(message.flags),
    )


def _grant(message: pb.Grant) -> results.Grant:
    return results.Grant(
        rule=message.rule,
        roots=tuple(_root(item) for item in message.roots),
        read_formats=tuple(message.read_formats),
        write_formats=tuple(message.write_formats),
        overwrite=_OVERWRITES.get(message.overwrite, results.OverwriteScope.UNSPECIFIED),
    )


def _root(message: pb.GrantedRoot) -> results.GrantedRoot:
    return results.GrantedRoot(
        name=message.name,
        path=message.path,
        kind=_KINDS.get(message.kind, results.RootKind.UNSPECIFIED),
        access=_ACCESSES.get(message.access, results.RootAccess.UNSPECIFIED),
        may_read=message.may_read,
        may_write=message.may_write,
        allow_is_zero=message.allow_is_zero,
    )


def _limits(message: pb.Limits) -> results.Limits:
    return results.Limits(
        jobs=message.jobs,
        jobs_per_user=message.jobs_per_user,
        queue=message.queue,
        queue_per_user=message.queue_per_user,
        inspections=message.inspections,
        inspections_per_user=message.inspections_per_user,
        connections=message.connections,
        connections_per_user=message.connections_per_user,
        virtual_size_bytes=message.virtual_size_bytes,
        memory_bytes=message.memory_bytes,
        stall_seconds=message.stall_seconds,
        duration_seconds=message.duration_seconds,
        inspect_seconds=message.inspect_seconds,
    )


def _time(message: timestamp_pb2.Timestamp) -> datetime.datetime:
    return message.ToDatetime(tzinfo=datetime.UTC)
