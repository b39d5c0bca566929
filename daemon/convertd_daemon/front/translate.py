"""Convert the contract's messages to our values, and back.

Checks only that each field has a value on our side.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from convertd.v1 import convert_pb2 as pb
from convertd_core import conditions, creation_options, proto_mapping, results, values

if TYPE_CHECKING:
    from google.protobuf.descriptor import FieldDescriptor

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
    found = []
    for end in (message.source, message.dest):
        if end.HasField("encryption"):
            found.append(end.encryption.passphrase)
            end.encryption.ClearField("passphrase")
    return found


def _options(message: pb.Destination) -> tuple[values.CreationOption, ...]:
    """The format's options, in qemu's spelling. qemu chooses those that are not set."""
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
    prefix = proto_mapping.prefix_of(field.enum_type)
    for choice in option.known:
        if named is not None and named.name == prefix + creation_options.contract_choice(choice):
            return choice
    raise _unknown(path, value)


# --- replies -----------------------------------------------------------------------------------


def started(job_id: str, plan: results.Plan) -> pb.ConvertResponse:
    """The first event of a conversion that runs."""
    message = proto_mapping.to_message(plan, pb.Plan())
    return pb.ConvertResponse(started=pb.ConvertStarted(job_id=job_id, plan=message))


def result(job_id: str, value: results.ConvertResult, queued_s: float) -> pb.ConvertResponse:
    """The last event of a conversion that succeeded. A job knows nothing of the queue."""
    value = dataclasses.replace(
        value,
        job_id=job_id,
        elapsed_seconds=queued_s + value.elapsed_seconds,
        queued_seconds=queued_s,
    )
    return pb.ConvertResponse(result=proto_mapping.to_message(value, pb.ConvertResult()))


def job(value: results.Job, known: pb.ConvertProgress | None) -> pb.Job:
    """One job of the list. The broker knows only whether it waits, we know the rest: `known`."""
    message: pb.Job = proto_mapping.to_message(value, pb.Job())
    # Its caller may not know yet that it moved up in the queue.
    if known is not None and known.phase != pb.PHASE_QUEUED:
        message.progress.CopyFrom(known)
    return message
