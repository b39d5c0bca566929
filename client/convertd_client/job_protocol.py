"""What is said to the job program, and what it answers: `[name, {field: value}]` in JSON.

The program comes with this package, in the same version, so neither side bears with the other's
mistakes. Imports no gRPC.
"""

from __future__ import annotations

import datetime
import json
from typing import Any, Final

from convertd_client import errors, results
from convertd_client.conversion import Conversion
from convertd_core import codec, messages, values

Fields = dict[str, Any]


def convert(asked: Conversion, qemu_img: str) -> bytes:
    """The order to convert an image. Its passphrases go another way."""
    order = messages.LocalRequest(qemu_img=qemu_img, request=asked.request)
    return codec.encode(order)


def inspect(path: str, image_format: str, qemu_img: str) -> bytes:
    """The order to look at an image."""
    request = values.InspectRequest(source=values.Source(path=path, format=image_format))
    order = messages.LocalRequest(qemu_img=qemu_img, request=request)
    return codec.encode(order)


def unsupported(what: str, why: str) -> errors.Unimplemented:
    """The error for a thing that can't be had here, as the daemon would word it."""
    message = f"{what} is not supported: {why}"
    metadata = {"what": what, "why": why}
    return errors.Unimplemented(message, reason="UNSUPPORTED", metadata=metadata)


def event(data: bytes) -> tuple[str, Fields]:
    """A message of the job, by name and fields."""
    name, fields = json.loads(data)
    return str(name), dict(fields)


def progress(fields: Fields, bytes_total: int, elapsed_s: float) -> results.Progress:
    """How far the job is."""
    percent = float(fields["progress"]["percent"])
    return results.Progress(
        job_id="",
        phase=results.Phase(fields["progress"]["phase"]),
        queue_position=0,
        percent=percent,
        bytes_done=int(bytes_total * percent / 100),
        bytes_total=bytes_total,
        elapsed_seconds=elapsed_s,
    )


def plan(fields: Fields) -> results.Plan:
    """What the job will do."""
    planned = fields["plan"]
    chain = tuple(_member(item) for item in planned["chain"])
    return results.Plan(
        source_format=chain[0].format,
        dest_format=planned["dest_format"],
        virtual_size_bytes=chain[0].virtual_size_bytes,
        dest_cache=_cache(planned["dest_cache"]),
        source_cache=_cache(planned["source_cache"]),
        command=tuple(planned["command"]),
        chain=chain,
        compression=results.Compression(planned["compression"]),
        needed_bytes=planned["needed_bytes"],
        available_bytes=planned["available_bytes"],
    )


def result(fields: Fields) -> results.ConvertResult:
    """What the job did."""
    done = fields["published"]
    planned = plan(done)
    seconds = float(done["seconds"])
    published = bool(done["published"])
    return results.ConvertResult(
        job_id="",
        published=published,
        source_format=planned.source_format,
        dest_format=planned.dest_format,
        virtual_size_bytes=planned.virtual_size_bytes,
        allocated_size_bytes=done["allocated_size_bytes"],
        dest_cache=planned.dest_cache,
        source_cache=planned.source_cache,
        warnings=_notices(done["warnings"]),
        elapsed_seconds=seconds,
        queued_seconds=0.0,
        bytes_per_second=planned.virtual_size_bytes / seconds if published and seconds else 0.0,
        verified=done["verified"],
        replaced=done["replaced"],
        plan=planned,
    )


def image(path: str, fields: Fields) -> results.ImageInfo:
    """What the job found an image to be."""
    top, contents = fields["chain"][0]["info"], fields["contents"]
    return results.ImageInfo(
        path=path,
        format=top["format"],
        virtual_size_bytes=top["virtual_size_bytes"],
        actual_size_bytes=top["actual_size_bytes"],
        cluster_size_bytes=top["cluster_size_bytes"],
        encrypted=top["encrypted"],
        dirty=top["dirty"],
        corrupt=top["corrupt"],
        compressed=contents["compressed"],
        backing_filename=top["backing_name"],
        backing_format=top["backing_format"],
        backing_chain=tuple(_member(item) for item in fields["chain"][1:]),
        backing_chain_complete=fields["complete"],
        snapshots=tuple(_snapshot(item) for item in contents["snapshots"]),
        bitmaps=tuple(_bitmap(item) for item in contents["bitmaps"]),
        format_specific=dict(top["details"]),
        qemu_img_json=fields["raw_json"],
        warnings=_notices(fields["warnings"]),
    )


def failure(fields: Fields) -> errors.ConvertError:
    """Why the job was not done."""
    told = fields["failure"]
    return errors.of_reason(told["reason"], told["message"], dict(told["values"]))


def _cache(fields: Fields) -> results.CacheChoice:
    return results.CacheChoice(mode=results.CacheMode(fields["mode"]), reason=fields["reason"])


def _member(fields: Fields) -> results.ImageMember:
    info = fields["info"]
    return results.ImageMember(
        path=fields["path"],
        format=info["format"],
        virtual_size_bytes=info["virtual_size_bytes"],
        actual_size_bytes=info["actual_size_bytes"],
        encrypted=info["encrypted"],
    )


def _notices(warnings: list[Fields]) -> tuple[results.Warning, ...]:
    return tuple(results.Warning(**item) for item in warnings)


def _snapshot(fields: Fields) -> results.Snapshot:
    microseconds = fields["created_ns"] // 1000
    return results.Snapshot(
        id=fields["id"],
        name=fields["name"],
        vm_state_size_bytes=fields["vm_state_size_bytes"],
        create_time=_EPOCH + datetime.timedelta(microseconds=microseconds),
        vm_clock_seconds=fields["vm_clock_ns"] / 1e9,
    )


def _bitmap(fields: Fields) -> results.Bitmap:
    return results.Bitmap(
        name=fields["name"],
        granularity_bytes=fields["granularity_bytes"],
        flags=tuple(fields["flags"]),
    )


_EPOCH: Final = datetime.datetime.fromtimestamp(0, tz=datetime.UTC)
