"""What is said to the job program, and what it answers: `[name, {field: value}]` in JSON.

The program comes with this package, in the same version, so neither side bears with the other's
mistakes. Imports no gRPC.
"""

from __future__ import annotations

import json
from typing import Any

from convertd_client import errors, results
from convertd_client.conversion import Conversion

Fields = dict[str, Any]


def convert(asked: Conversion, qemu_img: str) -> bytes:
    """The order to convert an image.

    Raises:
        errors.Unimplemented: it asks for encryption.
    """
    if asked.source_secret is not None or asked.dest_secret is not None:
        raise unsupported("encryption without a daemon", "not in this version")
    dest = {
        "path": asked.dest,
        "format": asked.dest_format,
        "compression": asked.compression,
        "preallocation": asked.preallocation,
        "mode": asked.mode,
        "group": asked.group,
        "overwrite": asked.overwrite,
    }
    request = {
        "source": {"path": asked.source, "format": asked.source_format},
        "dest": dest,
        "cache_mode": asked.cache_mode,
        "verify": asked.verify,
        "rate_limit_bytes_per_second": asked.rate_limit_bytes_per_second,
        "validate_only": asked.validate_only,
        "label": asked.label,
    }
    return _order({"qemu_img": qemu_img, "convert": request, "inspect": None})


def inspect(path: str, image_format: str, qemu_img: str) -> bytes:
    """The order to look at an image."""
    request = {"source": {"path": path, "format": image_format}}
    return _order({"qemu_img": qemu_img, "convert": None, "inspect": request})


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
    source = planned["source"]
    member = results.ImageMember(
        path=planned["source_path"],
        format=source["format"],
        virtual_size_bytes=source["virtual_size_bytes"],
        actual_size_bytes=source["actual_size_bytes"],
        encrypted=source["encrypted"],
    )
    return results.Plan(
        source_format=source["format"],
        dest_format=planned["dest_format"],
        virtual_size_bytes=source["virtual_size_bytes"],
        dest_cache=_cache(planned["dest_cache"]),
        source_cache=_cache(planned["source_cache"]),
        command=tuple(planned["command"]),
        chain=(member,),
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
        warnings=tuple(results.Notice(**item) for item in done["warnings"]),
        elapsed_seconds=seconds,
        queued_seconds=0.0,
        bytes_per_second=planned.virtual_size_bytes / seconds if published and seconds else 0.0,
        verified=done["verified"],
        replaced=done["replaced"],
        plan=planned,
    )


def image(path: str, fields: Fields) -> results.ImageInfo:
    """What the job found an image to be."""
    top = fields["chain"][0]
    return results.ImageInfo(
        path=path,
        format=top["format"],
        virtual_size_bytes=top["virtual_size_bytes"],
        actual_size_bytes=top["actual_size_bytes"],
        cluster_size_bytes=top["cluster_size_bytes"],
        encrypted=top["encrypted"],
        dirty=top["dirty"],
        corrupt=top["corrupt"],
        compressed=False,
        backing_filename=top["backing_name"],
        backing_format=top["backing_format"],
        backing_chain=(),
        backing_chain_complete=not top["backing_name"],
        snapshots=tuple(_snapshot(name) for name in top["snapshots"]),
        bitmaps=tuple(
            results.Bitmap(name=name, granularity_bytes=0, flags=()) for name in top["bitmaps"]
        ),
        format_specific=dict(top["details"]),
        qemu_img_json=fields["raw_json"],
        warnings=(),
    )


def failure(fields: Fields) -> errors.ConvertError:
    """Why the job was not done."""
    told = fields["failure"]
    return errors.of_reason(told["reason"], told["message"], dict(told["values"]))


def _order(fields: Fields) -> bytes:
    return json.dumps(["Order", fields], ensure_ascii=False, separators=(",", ":")).encode()


def _cache(fields: Fields) -> results.CacheChoice:
    return results.CacheChoice(mode=results.CacheMode(fields["mode"]), reason=fields["reason"])


def _snapshot(name: str) -> results.Snapshot:
    return results.Snapshot(
        id="", name=name, vm_state_size_bytes=0, create_time=None, vm_clock_seconds=0.0
    )
