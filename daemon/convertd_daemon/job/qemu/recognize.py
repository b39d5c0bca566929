"""Choose the one format that an image is read as, before qemu opens it. Fails closed.

A stated format must be one that the policy allows, and is used. If none is stated, the first bytes
choose one (see signatures), which must be allowed too: so qemu never runs a driver on the image
that the policy does not allow. Bytes that fit two formats are refused: read as the wrong one, they
would silently become a disk that can't be used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, results, validation
from convertd_daemon.job.qemu import signatures

if TYPE_CHECKING:
    from convertd_daemon.job.files.opened_source import Source

SECTOR_BYTES: Final = signatures.SECTOR_BYTES
TRAILER_BYTES: Final = signatures.TRAILER_BYTES


def format_of(source: Source, stated: str, allowed: frozenset[str]) -> str:
    """The format to read the source as: the stated one, or what its bytes say.

    Raises:
        conditions.FormatNotAllowed: the policy does not let this caller read it.
        conditions.AmbiguousFormat: none is stated, and the bytes fit more than one thing.
        conditions.ReadFailed: its first or last bytes can't be read.
    """
    if stated:
        _check_allowed(source, stated, allowed)
        return stated
    sample = sample_of(source)
    driver = signatures.driver_of(sample.head)
    _check_allowed(source, driver, allowed)
    if driver == "raw":
        _refuse_container(source, sample)
    else:
        _refuse_second_self(source, driver, sample)
    return driver


def sample_of(source: Source) -> signatures.Sample:
    """Read the parts of an image in which signatures are found.

    Raises:
        conditions.ReadFailed: it can't be read.
    """
    size = source.size_bytes
    try:
        return signatures.Sample(
            head=os.pread(source.fd, signatures.HEAD_BYTES, 0),
            volume=os.pread(source.fd, SECTOR_BYTES, signatures.VOLUME_OFFSET),
            tail=os.pread(source.fd, SECTOR_BYTES, _last_sector(size)),
            trailer=os.pread(source.fd, TRAILER_BYTES, max(size - TRAILER_BYTES, 0)),
            size_bytes=size,
        )
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise conditions.ReadFailed(path=source.place.path, problem=problem) from error


def _last_sector(size: int) -> int:
    """Where the last sector begins, a whole one or not."""
    return max(size - 1, 0) // SECTOR_BYTES * SECTOR_BYTES


def check_alone(source: Source, image_format: str) -> None:
    """Refuse an image for which qemu would open other files by name. Asked before qemu is.

    Raises:
        conditions.ImageRefused: its data is elsewhere.
        conditions.FormatMismatch: it is no such image, and qemu would look for names in it.
        conditions.ReadFailed: its first bytes can't be read.
    """
    path, head = source.place.path, sample_of(source).head
    if signatures.names_other_files(image_format, head):
        raise conditions.ImageRefused(path=path, problem="its data is in another file")
    if image_format == "vmdk" and not signatures.is_sparse_vmdk(head):
        raise conditions.FormatMismatch(path=path, format=image_format)


def check_header(source: Source, image_format: str) -> tuple[results.Warning, ...]:
    """Refuse what its header says is not all here, of the formats of which qemu does not ask.

    Raises:
        conditions.ImageRefused: its data is elsewhere, or its kind is not known.
        conditions.ReadFailed: its first or last bytes can't be read.
    """
    if image_format not in _CHECKS:
        return ()
    return _CHECKS[image_format](source, sample_of(source))


def _check_allowed(source: Source, image_format: str, allowed: frozenset[str]) -> None:
    if image_format not in allowed:
        # A backing file's format comes from the header of its overlay, which may be hostile.
        shown = validation.shown(image_format)
        raise conditions.FormatNotAllowed(path=source.place.path, format=shown)


def _refuse_container(source: Source, sample: signatures.Sample) -> None:
    found = signatures.container_of(sample)
    if found is None:
        return
    if found.format:
        remedy = f"state its format: {found.format}"
    elif found.unpack:
        remedy = f"unpack it ({found.unpack})"
    else:
        remedy = "unpack it"
    remedy += ", or, if it is a disk as it is, state its format: raw"
    raise conditions.AmbiguousFormat(path=source.place.path, found=found.name, remedy=remedy)


def _refuse_second_self(source: Source, driver: str, sample: signatures.Sample) -> None:
    other = signatures.second_self_of(driver, sample)
    if other:
        found = f"both {driver} and {other}"
        remedy = f"state its format: {driver}, or raw for the other"
        raise conditions.AmbiguousFormat(path=source.place.path, found=found, remedy=remedy)


def _check_vhd(source: Source, sample: signatures.Sample) -> tuple[results.Warning, ...]:
    path = source.place.path
    first = signatures.vhd_footer(sample.head[:SECTOR_BYTES])
    last = signatures.vhd_footer(sample.tail)
    # qemu takes one that begins with a footer for dynamic, whatever its type; else goes by the end.
    footer, expected = (first, signatures.VHD_DYNAMIC) if first else (last, signatures.VHD_FIXED)
    types = {one.disk_type for one in (first, last) if one}
    if footer is None:
        raise conditions.ImageRefused(path=path, problem="it has no VHD footer")
    if signatures.VHD_DIFFERENCING in types:
        problem = "it is a differencing VHD, so its data is in another file"
        raise conditions.ImageRefused(path=path, problem=problem)
    if types != {expected}:
        problem = "its footers have an unknown disk type, or two different ones"
        raise conditions.ImageRefused(path=path, problem=problem)
    if not first and footer.current_size_bytes > _last_sector(source.size_bytes):
        problem = "its footer states a larger disk than the file holds"
        raise conditions.ImageRefused(path=path, problem=problem)
    held = footer.current_size_bytes if first else _last_sector(source.size_bytes)
    return _warnings_of(path, footer, held)


def _warnings_of(path: str, footer: signatures.VhdFooter, held: int) -> tuple[results.Warning, ...]:
    """Say where sizes differ; `held` is how many bytes of a disk the file has."""
    geometry, current = footer.geometry_bytes, footer.current_size_bytes
    if held > current:
        message = f"{path}: its file has {held} bytes, its current size is {current}: "
        message += f"the last {held - current} are not read"
    elif geometry not in {current, signatures.VHD_LARGEST_GEOMETRY}:
        message = f"{path}: its geometry gives {geometry} bytes, its current size is {current}: "
        message += f"{'all ' if geometry < current else ''}{current} are read"
    else:
        return ()
    return (results.Warning(reason="VHD_SIZES_DIFFER", message=message),)


def _check_vdi(source: Source, sample: signatures.Sample) -> tuple[results.Warning, ...]:
    if signatures.vdi_type(sample.head) not in signatures.VDI_ALONE:
        problem = "it is neither a dynamic nor a fixed VDI, so its data may be in another file"
        raise conditions.ImageRefused(path=source.place.path, problem=problem)
    return ()


def _check_dmg(source: Source, sample: signatures.Sample) -> tuple[results.Warning, ...]:
    if signatures.dmg_segments(sample.trailer) > 1:
        problem = "it is one of several segments, so other files have data of it too"
        raise conditions.ImageRefused(path=source.place.path, problem=problem)
    return ()


_CHECKS: Final = {"vpc": _check_vhd, "vdi": _check_vdi, "dmg": _check_dmg}
