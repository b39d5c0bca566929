"""Between the messages of the contract and the values that the rest of the daemon speaks of.

Nothing is judged here but whether a message says something that has a value on the other side.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Final

from convertd.v1 import convert_pb2 as pb
from convertd_core import conditions, creation_options, messages, proto_mapping, results, values

if TYPE_CHECKING:
    from google.protobuf.descriptor import FieldDescriptor

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


def started(job_id: str, plan: results.Plan) -> pb.ConvertResponse:
    """The first event of a conversion that runs."""
    message = proto_mapping.to_message(plan, pb.Plan())
    return pb.ConvertResponse(started=pb.ConvertStarted(job_id=job_id, plan=message))


def progress(value: results.Progress) -> pb.ConvertProgress:
    """How far a conversion is."""
    message: pb.ConvertProgress = proto_mapping.to_message(value, pb.ConvertProgress())
    return message


def result(job_id: str, value: results.ConvertResult, queued_s: float) -> pb.ConvertResponse:
    """The last event of a conversion that succeeded. A job knows nothing of the queue."""
    value = dataclasses.replace(
        value,
        job_id=job_id,
        elapsed_seconds=queued_s + value.elapsed_seconds,
        queued_seconds=queued_s,
    )
    return pb.ConvertResponse(result=proto_mapping.to_message(value, pb.ConvertResult()))


def inspected(image: results.ImageInfo) -> pb.InspectResponse:
    """What an image is."""
    message: pb.InspectResponse = proto_mapping.to_message(image, pb.InspectResponse())
    return message


def job(entry: messages.JobEntry, progress: pb.ConvertProgress | None) -> pb.Job:
    """One line of the list of jobs."""
    message = pb.Job(
        job_id=entry.job_id,
        uid=entry.uid,
        source_path=entry.source,
        source_format=entry.source_format,
        dest_path=entry.dest,
        dest_format=entry.dest_format,
        state=proto_mapping.number_of(entry.state, pb.JobState.DESCRIPTOR),
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
        compressions=[
            proto_mapping.number_of(values.Compression(name), pb.Compression.DESCRIPTOR)
            for name in report.versions.compressions
        ],
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
    message = pb.ConversionStats(
        source_format=counted.source_format,
        dest_format=counted.dest_format,
        reason=counted.reason,
        count=counted.count,
        bytes=counted.virtual_bytes,
        shared_bytes=counted.shared_bytes,
        seconds=counted.seconds,
        durations=[
            pb.HistogramBucket(upper_bound_seconds=bound, count=total)
            for bound, total in zip((*bounds, math.inf), totals, strict=True)
        ],
    )
    if counted.method is not None:
        message.method = proto_mapping.number_of(counted.method, pb.Method.DESCRIPTOR)
    return message
