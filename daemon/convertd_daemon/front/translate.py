"""Between the messages of the contract and the values that the rest of the daemon speaks of.

Nothing is judged here but whether a message says something that has a value on the other side.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Final, TypeVar

from convertd.v1 import convert_pb2 as pb
from convertd_core import conditions, creation_options, messages, proto_mapping, values

if TYPE_CHECKING:
    from google.protobuf.descriptor import FieldDescriptor

V = TypeVar("V")

NOT_YET: Final = "not in this version"

CACHE_MODES: Final = {
    pb.CACHE_MODE_AUTO: values.CacheMode.AUTO,
    pb.CACHE_MODE_NONE: values.CacheMode.NONE,
    pb.CACHE_MODE_WRITEBACK: values.CacheMode.WRITEBACK,
    pb.CACHE_MODE_WRITETHROUGH: values.CacheMode.WRITETHROUGH,
    pb.CACHE_MODE_DIRECTSYNC: values.CacheMode.DIRECTSYNC,
}
COMPRESSIONS: Final = {
    pb.COMPRESSION_NONE: values.Compression.NONE,
    pb.COMPRESSION_DEFAULT: values.Compression.DEFAULT,
    pb.COMPRESSION_ZLIB: values.Compression.ZLIB,
    pb.COMPRESSION_ZSTD: values.Compression.ZSTD,
}
CACHE_MODES_OUT: Final = {mode: number for number, mode in CACHE_MODES.items()}
COMPRESSIONS_OUT: Final = {mode.value: number for number, mode in COMPRESSIONS.items()}
PHASES: Final = {
    values.Phase.QUEUED: pb.PHASE_QUEUED,
    values.Phase.PREPARING: pb.PHASE_PREPARING,
    values.Phase.CONVERTING: pb.PHASE_CONVERTING,
    values.Phase.FLUSHING: pb.PHASE_FLUSHING,
    values.Phase.VERIFYING: pb.PHASE_VERIFYING,
    values.Phase.PUBLISHING: pb.PHASE_PUBLISHING,
}
STATES: Final = {
    messages.JobState.QUEUED: pb.JOB_STATE_QUEUED,
    messages.JobState.RUNNING: pb.JOB_STATE_RUNNING,
    messages.JobState.CANCELLING: pb.JOB_STATE_CANCELLING,
    messages.JobState.UNKILLABLE: pb.JOB_STATE_UNKILLABLE,
}
KINDS: Final = {
    values.RootKind.FILES: pb.ROOT_KIND_FILE,
    values.RootKind.BLOCK: pb.ROOT_KIND_BLOCK,
}
ACCESSES: Final = {
    values.RootAccess.DAEMON: pb.ROOT_ACCESS_DAEMON,
    values.RootAccess.CALLER: pb.ROOT_ACCESS_CALLER,
}
OVERWRITES: Final = {
    values.OverwriteScope.OWN: pb.OVERWRITE_SCOPE_OWN,
    values.OverwriteScope.ANY: pb.OVERWRITE_SCOPE_ANY,
}


# --- requests ----------------------------------------------------------------------------------


def convert_request(message: pb.ConvertRequest) -> values.ConvertRequest:
    """What a ConvertRequest asks for.

    Raises:
        conditions.BadOption: a value of an enum that this version does not know.
        conditions.BadOption: options of another format.
    """
    request = proto_mapping.from_message(values.ConvertRequest, message, _unknown)
    dest = dataclasses.replace(request.dest, options=_options(message.dest))
    return dataclasses.replace(request, dest=dest)


def inspect_request(message: pb.InspectRequest) -> values.InspectRequest:
    """What an InspectRequest asks for."""
    return proto_mapping.from_message(values.InspectRequest, message, _unknown)


def _unknown(field: str, number: int) -> conditions.BadOption:
    return conditions.BadOption(field=field, problem=f"has no value {number}")


def secrets(message: pb.ConvertRequest) -> list[bytes]:
    """The passphrases of a request, the source's first. Takes them out of the message."""
    ends = [message.source.encryption] if message.source.HasField("encryption") else []
    if message.dest.HasField("encryption"):
        return [*_taken(ends), *_taken([message.dest.encryption])]
    return _taken(ends)


def _taken(ends: list[pb.SourceEncryption] | list[pb.DestinationEncryption]) -> list[bytes]:
    found = [end.passphrase for end in ends]
    for end in ends:
        end.ClearField("passphrase")
    return found


def _options(message: pb.Destination) -> tuple[values.CreationOption, ...]:
    """The options of the format, in qemu's words; those left out are qemu's to choose."""
    kind = message.WhichOneof("options")
    if kind is None:
        return ()
    if kind != message.format:
        problem = f"are options of another format than {message.format[:32]!r}"
        raise conditions.BadOption(field=f"dest.{kind}", problem=problem)
    fields = getattr(message, kind).DESCRIPTOR.fields_by_name
    found = []
    for name, option in creation_options.OPTIONS[kind].items():
        field = fields[creation_options.field_of(name)]
        # What is not set, or has protobuf's zero, is left out.
        value = getattr(getattr(message, kind), field.name)
        if value:
            text = _qemu_value(f"dest.{kind}.{field.name}", option, field, value)
            found.append(values.CreationOption(name=name, value=text))
    return tuple(found)


def _qemu_value(
    path: str, option: creation_options.Option, field: FieldDescriptor, value: int
) -> str:
    if field.enum_type is None:
        return creation_options.qemu_value(value)
    named = field.enum_type.values_by_number.get(value)
    prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
    for choice in option.known:
        if named is not None and named.name == prefix + creation_options.contract_choice(choice):
            return choice
    raise _unknown(path, value)


# --- replies -----------------------------------------------------------------------------------


def plan(value: values.Plan) -> pb.Plan:
    """A plan, for people and programs to read."""
    return pb.Plan(
        source_format=value.source.format,
        dest_format=value.dest_format,
        virtual_size_bytes=value.source.virtual_size_bytes,
        dest_cache=_cache(value.dest_cache),
        source_cache=_cache(value.source_cache),
        command=value.command,
        compression=COMPRESSIONS_OUT[value.compression],
        needed_bytes=value.needed_bytes,
        available_bytes=value.available_bytes,
        chain=[_member(member) for member in value.chain],
    )


def started(job_id: str, value: values.Plan) -> pb.ConvertResponse:
    """The first event of a conversion that runs."""
    event = pb.ConvertStarted(job_id=job_id, plan=plan(value))
    return pb.ConvertResponse(started=event)


def result(job_id: str, value: values.Published, queued_s: float) -> pb.ConvertResponse:
    """The last event of a conversion that succeeded."""
    planned = value.plan
    speed = planned.source.virtual_size_bytes / value.seconds if value.seconds else 0.0
    event = pb.ConvertResult(
        job_id=job_id,
        published=value.published,
        source_format=planned.source.format,
        dest_format=planned.dest_format,
        virtual_size_bytes=planned.source.virtual_size_bytes,
        allocated_size_bytes=value.allocated_size_bytes,
        dest_cache=_cache(planned.dest_cache),
        source_cache=_cache(planned.source_cache),
        warnings=_warnings(value.warnings),
        elapsed_seconds=queued_s + value.seconds,
        queued_seconds=queued_s,
        bytes_per_second=speed if value.published else 0.0,
        verified=value.verified,
        replaced=value.replaced,
    )
    return pb.ConvertResponse(result=event)


def _cache(value: values.CacheChoice) -> pb.CacheChoice:
    return pb.CacheChoice(mode=CACHE_MODES_OUT[value.mode], reason=value.reason)


def _member(member: values.ChainMember) -> pb.ImageMember:
    info = member.info
    return pb.ImageMember(
        path=member.path,
        format=info.format,
        virtual_size_bytes=info.virtual_size_bytes,
        actual_size_bytes=info.actual_size_bytes,
        encrypted=info.encrypted,
    )


def inspected(path: str, message: messages.Inspected) -> pb.InspectResponse:
    """What an image is."""
    top = message.chain[0].info
    return pb.InspectResponse(
        path=path,
        format=top.format,
        virtual_size_bytes=top.virtual_size_bytes,
        actual_size_bytes=top.actual_size_bytes,
        cluster_size_bytes=top.cluster_size_bytes,
        encrypted=top.encrypted,
        dirty=top.dirty,
        corrupt=top.corrupt,
        compressed=message.contents.compressed,
        backing_filename=top.backing_name,
        backing_format=top.backing_format,
        backing_chain=[_member(member) for member in message.chain[1:]],
        backing_chain_complete=message.complete,
        snapshots=[_snapshot(item) for item in message.contents.snapshots],
        bitmaps=[
            pb.Bitmap(name=item.name, granularity_bytes=item.granularity_bytes, flags=item.flags)
            for item in message.contents.bitmaps
        ],
        format_specific=dict(top.details),
        qemu_img_json=message.raw_json,
        warnings=_warnings(message.warnings),
    )


def _snapshot(value: values.Snapshot) -> pb.Snapshot:
    message = pb.Snapshot(
        id=value.id,
        name=value.name,
        vm_state_size_bytes=value.vm_state_size_bytes,
        vm_clock_seconds=value.vm_clock_ns / 1e9,
    )
    message.create_time.FromNanoseconds(value.created_ns)
    return message


def _warnings(items: tuple[values.Warning, ...]) -> list[pb.Warning]:
    return [pb.Warning(reason=item.reason, message=item.message) for item in items]


def job(entry: messages.JobEntry, progress: pb.ConvertProgress | None) -> pb.Job:
    """One line of the list of jobs."""
    message = pb.Job(
        job_id=entry.job_id,
        uid=entry.uid,
        source_path=entry.source,
        source_format=entry.source_format,
        dest_path=entry.dest,
        dest_format=entry.dest_format,
        state=STATES[entry.state],
        label=entry.label,
        progress=progress,
    )
    if message.progress.phase == pb.PHASE_QUEUED:
        # Its caller may not have been told yet that it moved up.
        message.progress.queue_position = max(entry.position - 1, 0)
    message.create_time.FromNanoseconds(int(entry.queued * 1e9))
    if entry.started is not None:
        message.start_time.FromNanoseconds(int(entry.started * 1e9))
    return message


def access(report: messages.AccessReport) -> pb.GetAccessResponse:
    """Who the daemon takes the caller for, and what that may do."""
    return pb.GetAccessResponse(
        uid=report.uid,
        gid=report.gid,
        groups=sorted(report.groups),
        is_operator=report.rights.is_operator,
        grants=[_grant(rule) for rule in report.rights.rules],
        limits=_limits(report.limits),
        versions=pb.Versions(
            daemon=report.versions.daemon,
            qemu_img=report.versions.qemu_img,
            landlock_abi=report.versions.landlock_abi,
            kernel=report.versions.kernel,
        ),
        source_formats=sorted(report.versions.formats & values.FORMATS),
        dest_formats=sorted(report.versions.formats & values.WRITABLE_FORMATS),
        compressions=[COMPRESSIONS_OUT[name] for name in report.versions.compressions],
    )


def _limits(limits: values.Limits) -> pb.Limits:
    return pb.Limits(
        jobs=limits.jobs,
        jobs_per_user=limits.jobs_per_user,
        queue=limits.queue,
        queue_per_user=limits.queue_per_user,
        inspections=limits.inspections,
        inspections_per_user=limits.inspections_per_user,
        connections=limits.connections,
        connections_per_user=limits.connections_per_user,
        virtual_size_bytes=limits.virtual_size_bytes,
        memory_bytes=limits.memory_bytes,
        stall_seconds=limits.stall_s,
        duration_seconds=limits.duration_s,
        inspect_seconds=limits.inspect_s,
    )


def _grant(rule: values.RuleRights) -> pb.Grant:
    return pb.Grant(
        rule=rule.rule,
        roots=[
            pb.GrantedRoot(
                name=item.root.name,
                path=item.root.path,
                kind=KINDS[item.root.kind],
                access=ACCESSES[item.root.access],
                may_read=item.may_read,
                may_write=item.may_write,
                allow_is_zero=item.root.allow_is_zero,
            )
            for item in rule.roots
        ],
        read_formats=sorted(rule.read_formats),
        write_formats=sorted(rule.write_formats),
        overwrite=OVERWRITES[rule.overwrite],
    )


def stats(report: messages.StatsReport) -> pb.GetStatsResponse:
    """What the daemon does now; its counts follow."""
    answer = pb.GetStatsResponse(
        jobs_running=report.running, jobs_queued=report.queued, connections=report.connections
    )
    answer.start_time.FromNanoseconds(int(report.started * 1e9))
    return answer


def conversion_stats(
    counted: messages.ConversionStats, bounds: tuple[float, ...]
) -> pb.ConversionStats:
    """Conversions of one kind. Each bucket counts those before it too."""
    totals = itertools.accumulate(counted.buckets)
    return pb.ConversionStats(
        source_format=counted.source_format,
        dest_format=counted.dest_format,
        reason=counted.reason,
        count=counted.count,
        bytes=counted.virtual_bytes,
        seconds=counted.seconds,
        durations=[
            pb.HistogramBucket(upper_bound_seconds=bound, count=total)
            for bound, total in zip((*bounds, math.inf), totals, strict=True)
        ],
    )
