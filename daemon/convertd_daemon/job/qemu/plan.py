"""Plan the command from the grant and from what was found. Pure: no system call.

The arguments name descriptors only. The source is always one complete graph of block drivers,
down to an explicit `backing: null`: a header rewritten after the probe can't add a parent, because
qemu no longer asks the header.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Final

from convertd_core import conditions, format_sizes, results, values
from convertd_daemon.job import stages
from convertd_daemon.job.qemu import cache_modes

SECTOR_BYTES: Final = 512

COROUTINES: Final = "16"
"""`-m`: with `-c` and `-W`, 22.3 s instead of 41.8 s (4 GiB, 700 MiB of data, 2 cores). To raw,
qemu-img's own 8 are as quick."""

SOURCE_SECRET: Final = "source"  # noqa: S105 - a name
DEST_SECRET: Final = "dest"  # noqa: S105 - a name
"""The ids of the `secret` objects in graphs and options."""

WITHOUT_BACKING: Final = frozenset({"raw", "luks"})
"""The drivers that have no `backing` to be set, not even to null."""

RUNTIME_OPTIONS: Final = {"vpc": {"force_size_calc": "current_size"}}
"""How a format is opened, wherever it is. A VHD has two sizes, and some programs' are taken for the
one of a disk of 1990, rounded down: the last sectors are then missing. Source: qemu block/vpc.c."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One opened image: its format, where it is open, and on what.

    `alias` is a path to the descriptor with another last name, for a destination.
    """

    format: str
    fd: int
    on_device: bool = False
    alias: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the job found out about the two ends, as far as the plan depends on it.

    `chain` begins with the source itself. `*_direct` is None where reading or writing 4096 aligned
    bytes with O_DIRECT worked, else the kernel's error. `in_memory` says that the chain is in the
    page cache. `available_bytes` is the room that the destination's file system has, or the
    device's size.
    """

    chain: tuple[Node, ...]
    dest: Node
    source_direct: str | None
    dest_direct: str | None
    available_bytes: int
    in_memory: bool = False


def make(
    grant: values.ConvertGrant, chain: tuple[stages.ChainMember, ...], facts: Facts
) -> stages.ConversionPlan:
    """Decide how the conversion is run.

    Raises:
        conditions.ImageTooLarge: the virtual size is over the policy's limit.
        conditions.SizeNotPossible: the destination's format has no images of that size.
        conditions.NoDirectWrites: a cache mode was asked for that the destination can't do.
    """
    info, limit = chain[0].info, grant.limits.virtual_size_bytes
    if info.virtual_size_bytes > limit:
        raise conditions.ImageTooLarge(
            path=grant.source.path, size_bytes=info.virtual_size_bytes, limit_bytes=limit
        )
    dest = grant.request.dest
    format_sizes.check(grant.dest.path, dest, info.virtual_size_bytes)
    source_cache = cache_modes.of_source(facts.source_direct, in_memory=facts.in_memory)
    dest_cache = cache_modes.of_dest(grant, facts.dest_direct)
    options = _options(grant, source_cache, dest_cache)
    source = graph(facts.chain, encrypted=grant.request.source.encryption is not None)
    return stages.ConversionPlan(
        source_format=info.format,
        dest_format=dest.format,
        virtual_size_bytes=info.virtual_size_bytes,
        dest_cache=dest_cache,
        source_cache=source_cache,
        chain=tuple(member.reported for member in chain),
        compression=dest.compression,
        method=results.Method.QEMU_IMG,
        method_reason="",
        argv=(*options, *_dest_arguments(grant, facts), source, _dest_name(facts)),
        command=_command(grant, facts, options, info.format),
        needed_bytes=0 if facts.dest.on_device else _needed_bytes(grant, chain),
        available_bytes=facts.available_bytes,
        warnings=(*_warnings(info), *(warned for one in chain for warned in one.info.warnings)),
        write_behind=cache_modes.is_written_behind(
            grant, dest_cache, on_device=facts.dest.on_device
        ),
    )


def with_rates(plan: stages.ConversionPlan, rates: stages.WriteRates) -> stages.ConversionPlan:
    """The same plan, with the cache mode that a trial of the destination's disk suggests."""
    chosen = cache_modes.after_trial(rates)

    def in_that_mode(argv: tuple[str, ...]) -> tuple[str, ...]:
        option = argv.index("-t")
        return (*argv[: option + 1], chosen.mode.value, *argv[option + 2 :])

    return dataclasses.replace(
        plan,
        dest_cache=chosen,
        argv=in_that_mode(plan.argv),
        command=in_that_mode(plan.command),
        write_behind=chosen.mode is values.CacheMode.WRITEBACK,
    )


def info_argv(fd: int, image_format: str, *, shared: bool = False) -> tuple[str, ...]:
    """`qemu-img info` of one descriptor, as that format and no other.

    `shared` also reads an image that a running qemu is writing.
    """
    force = ("--force-share",) if shared else ()
    command = ("qemu-img", "info", "--output=json", *force)
    if image_format not in RUNTIME_OPTIONS:
        return (*command, "-f", image_format, path_of(fd))
    options = {
        "driver": image_format,
        **RUNTIME_OPTIONS[image_format],
        "file.filename": path_of(fd),
    }
    listed = ",".join(f"{name}={value}" for name, value in options.items())
    return (*command, "--image-opts", listed)


def check_argv(node: Node, *, encrypted: bool = False) -> tuple[str, ...]:
    """`qemu-img check` of one image: do its tables lead where they should."""
    return ("qemu-img", "check", "--output=json", graph((node,), encrypted=encrypted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A part of a disk; its end may lie beyond the disk's."""

    start_bytes: int
    length_bytes: int


def map_argv(
    *chain: Node, encrypted: bool = False, stretch: Stretch | None = None
) -> tuple[str, ...]:
    """`qemu-img map` of a chain, as if nothing were under it: where its data lies."""
    part: tuple[str, ...] = ()
    if stretch:
        start, length = stretch.start_bytes, stretch.length_bytes
        part = (f"--start-offset={start}", f"--max-length={length}")
    return ("qemu-img", "map", "--output=json", *part, graph(chain, encrypted=encrypted))


def compare_argv(
    grant: values.ConvertGrant, plan: stages.ConversionPlan, chain: tuple[Node, ...], dest: Node
) -> tuple[str, ...]:
    """`qemu-img compare` of what was read with what was written."""
    request = grant.request
    written = graph(
        (dest,),
        encrypted=request.dest.encryption is not None,
        secret=DEST_SECRET,
        # A device may be larger than the image that is on it.
        size_bytes=plan.virtual_size_bytes if dest.on_device else 0,
    )
    read = graph(chain, encrypted=request.source.encryption is not None)
    return ("qemu-img", "compare", "-T", plan.source_cache.mode.value, read, written)


def graph(
    chain: tuple[Node, ...],
    *,
    encrypted: bool = False,
    secret: str = SOURCE_SECRET,
    size_bytes: int = 0,
) -> str:
    """A chain of images as qemu's block graph: these drivers, on these descriptors, and no more.

    Only the first may be encrypted. A `size_bytes` shows no more of a raw image than that.
    """
    under: dict[str, object] | None = None
    for node in reversed(chain):
        driver = "host_device" if node.on_device else "file"
        file = {"driver": driver, "filename": path_of(node.fd)}
        under = (
            {"driver": node.format, "file": file}
            | RUNTIME_OPTIONS.get(node.format, {})
            | ({} if node.format in WITHOUT_BACKING else {"backing": under})
        )
    nodes = under or {}
    if encrypted and chain[0].format == "luks":
        nodes["key-secret"] = secret
    elif encrypted:
        nodes["encrypt"] = {"format": "luks", "key-secret": secret}
    if size_bytes:
        nodes["size"] = size_bytes
    return "json:" + json.dumps(nodes, separators=(",", ":"))


def with_secrets(argv: tuple[str, ...], pipes: dict[str, int]) -> tuple[str, ...]:
    """The same command, with the `secret` objects that its graphs and options name."""
    objects = [
        argument
        for name, fd in pipes.items()
        for argument in ("--object", f"secret,id={name},file={path_of(fd)}")
    ]
    program, command, *rest = argv
    return (program, command, *objects, *rest)


def path_of(fd: int) -> str:
    """The only kind of file name that qemu-img is ever given."""
    return f"/proc/self/fd/{fd}"


def raw_info(size_bytes: int, allocated_bytes: int) -> stages.ProbedImage:
    """What there is to know of an image that the caller declared raw: nothing that is in it.

    Guests may write anything into their disks, so a declared raw image is never probed. Its
    size is rounded up to sectors, as qemu does.
    """
    sectors = -(-size_bytes // SECTOR_BYTES)
    return stages.ProbedImage(
        format="raw",
        virtual_size_bytes=sectors * SECTOR_BYTES,
        actual_size_bytes=allocated_bytes,
    )


def _options(
    grant: values.ConvertGrant, source_cache: results.CacheChoice, dest_cache: results.CacheChoice
) -> tuple[str, ...]:
    dest = grant.request.dest
    argv = ["qemu-img", "convert", "-p", "-t", dest_cache.mode.value]
    argv += ["-T", source_cache.mode.value]
    if compresses(dest):
        argv += ["-c"]
    if dest.format == "raw" or compresses(dest):
        # Out of order is quicker, and fragments other formats' files.
        argv += ["-W"]
    if compresses(dest):
        argv += ["-m", COROUTINES]
    if grant.request.rate_limit_bytes_per_second:
        argv += ["-r", str(grant.request.rate_limit_bytes_per_second)]
    return tuple(argv)


def _dest_arguments(grant: values.ConvertGrant, facts: Facts) -> tuple[str, ...]:
    """How the destination is made, or (a device) only opened."""
    dest = grant.request.dest
    if facts.dest.on_device:
        # -n: it is there. qemu then writes the zeroes too, for it knows nothing of what is on it.
        blank = ("--target-is-zero",) if dest.is_zero else ()
        return ("-n", *blank, "--target-image-opts")
    options = ",".join(f"{option.name}={option.value}" for option in _create_options(dest))
    return ("-O", dest.format, *(("-o", options) if options else ()))


def _command(
    grant: values.ConvertGrant, facts: Facts, options: tuple[str, ...], source_format: str
) -> tuple[str, ...]:
    """The same for people: with paths, and a place for the passphrase where there is one."""
    request = grant.request
    program, verb, *rest = options
    dest = () if request.dest.encryption is None else (f"secret,id={DEST_SECRET},file=PASSPHRASE",)
    objects = tuple(word for secret in dest for word in ("--object", secret))
    made = _dest_arguments(grant, facts)
    if facts.dest.on_device:
        made = ("-n", *(word for word in made if word == "--target-is-zero"), "-O", "raw")
    paths = (grant.source.path, request.dest.path)
    source, written = paths
    opened: tuple[str, ...] = ("-f", source_format, source)
    if source_format in RUNTIME_OPTIONS:
        # A comma in a name is written twice. Source: qemu util/keyval.c.
        name = source.replace(",", ",,")
        found = {"driver": source_format, **RUNTIME_OPTIONS[source_format], "file.filename": name}
        opened = ("--image-opts", ",".join(f"{key}={value}" for key, value in found.items()))
    return (program, verb, *objects, *rest, *made, *opened, written)


def _dest_name(facts: Facts) -> str:
    name = path_of(facts.dest.fd)
    if facts.dest.on_device:
        return f"driver=raw,file.driver=host_device,file.filename={name}"
    return facts.dest.alias or name


def compresses(dest: values.Destination) -> bool:
    """Whether the result is to be compressed, by whichever method."""
    return dest.compression is not values.Compression.NONE


def _create_options(dest: values.Destination) -> list[values.CreationOption]:
    options = list(dest.options)
    if dest.compression is values.Compression.ZSTD:
        options.append(values.CreationOption(name="compression_type", value="zstd"))
    if dest.preallocation is not values.Preallocation.OFF:
        options.append(values.CreationOption(name="preallocation", value=dest.preallocation.value))
    if dest.format == "vpc":
        # Without it qemu rounds the size to what a disk of 1990 could have had.
        options.append(values.CreationOption(name="force_size", value="on"))
    if dest.encryption is not None:
        options += _encryption_options(dest.format, dest.encryption)
    return options


def _encryption_options(
    image_format: str, asked: values.DestinationEncryption
) -> list[values.CreationOption]:
    named = {
        "key-secret": DEST_SECRET,
        "cipher-alg": asked.cipher_alg,
        "cipher-mode": asked.cipher_mode,
        "hash-alg": asked.hash_alg,
        "ivgen-alg": asked.ivgen_alg,
        "ivgen-hash-alg": asked.ivgen_hash_alg,
        "iter-time": str(asked.iter_time_milliseconds),
    }
    if image_format != "qcow2":
        return [values.CreationOption(name=name, value=value) for name, value in named.items()]
    inside = {"format": "luks", **named}
    return [
        values.CreationOption(name=f"encrypt.{name}", value=value) for name, value in inside.items()
    ]


def _needed_bytes(grant: values.ConvertGrant, chain: tuple[stages.ChainMember, ...]) -> int:
    """What the result will take. `qemu-img measure` would ask for far too much."""
    dest, virtual = grant.request.dest, chain[0].info.virtual_size_bytes
    if dest.preallocation in {values.Preallocation.FALLOC, values.Preallocation.FULL}:
        return virtual
    if compresses(dest):
        return 0
    return min(sum(member.info.actual_size_bytes for member in chain), virtual)


def _warnings(info: stages.ProbedImage) -> tuple[results.Warning, ...]:
    """What a conversion leaves behind without a word from qemu-img."""
    possible = (
        (info.snapshots, "SNAPSHOTS_DROPPED", f"{len(info.snapshots)} internal snapshots"),
        (info.bitmaps, "BITMAPS_DROPPED", f"{len(info.bitmaps)} bitmaps"),
    )
    dropped = [
        results.Warning(reason=reason, message=f"{what} of the source are not in the result")
        for found, reason, what in possible
        if found
    ]
    if info.dirty:
        message = "the source was not closed cleanly: its dirty flag is set"
        dropped.append(results.Warning(reason="SOURCE_DIRTY", message=message))
    return tuple(dropped)
