"""Checks of a request that do not depend on the policy: paths, formats, combinations of options.

Pure, and the standard library alone, so that a job without a daemon checks the same. Nothing here
looks at the system, and so nothing here tells a caller what exists.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Final

from convertd_core import conditions, creation_options, values

MAX_PATH_BYTES: Final = 4095
"""PATH_MAX less its NUL. Source: path_resolution(7)."""
MAX_NAME_BYTES: Final = 255
"""NAME_MAX of every file system of Linux that holds images."""
MAX_LABEL_BYTES: Final = 128
MAX_PASSPHRASE_BYTES: Final = 4096
LEAST_RATE_BYTES_PER_SECOND: Final = values.MIB
MAX_RATE_BYTES_PER_SECOND: Final = 2**63 - 1
"""What qemu-img's -r takes at most."""
MODE_BITS: Final = 0o666
TEMPORARY_PREFIX: Final = ".convertd-"
"""The start of the names of convertd's temporaries, which it removes when no job has them open."""

ENCRYPTABLE_FORMATS: Final = frozenset({"qcow2", "luks"})

STREAM_OPTIMIZED: Final = values.CreationOption(name="subformat", value="streamOptimized")
"""The layout of vmdk that is compressed, always with zlib."""

PREALLOCATIONS: Final = {
    "raw": frozenset(
        {values.Preallocation.OFF, values.Preallocation.FALLOC, values.Preallocation.FULL}
    ),
    "qcow2": frozenset(values.Preallocation),
}
"""Which preallocation a format takes. One that is not listed takes none."""

_GROUP: Final = re.compile(r"[a-z_][a-z0-9_.-]*\$?|[0-9]{1,10}")
_SHOWN_CHARACTERS: Final = 256


def checked_convert(request: values.ConvertRequest) -> values.ConvertRequest:
    """Give a request back that can be meant, with the default compression spelled out.

    Raises:
        conditions.BadPath, conditions.BadFormat, conditions.BadOption: it can't be meant.
    """
    _check_source(request.source)
    _check_dest(request.dest)
    _check_encryption("dest", request.dest.format, encrypted=request.dest.encryption is not None)
    creation_options.check(request.dest)
    _check_options(request)
    if request.source.path == request.dest.path:
        raise _bad_path("dest.path", request.dest.path, "is the source")
    if request.dest.compression is not values.Compression.DEFAULT:
        return request
    dest = dataclasses.replace(request.dest, compression=values.Compression.ZLIB)
    return dataclasses.replace(request, dest=dest)


def checked_inspect(request: values.InspectRequest) -> values.InspectRequest:
    """Give a request back that can be meant.

    Raises:
        conditions.BadPath, conditions.BadFormat: it can't be meant.
    """
    _check_path_and_format(request.source)
    return request


def reflink_obstacle(request: values.ConvertRequest) -> str:
    """Name what the data must be written anew for, so that no block can be shared; or "".

    A cache mode and a rate limit are none: they say how data is copied, if it is.
    """
    source, dest = request.source, request.dest
    if source.encryption is not None or dest.encryption is not None:
        return "encryption"
    if dest.compression is not values.Compression.NONE:
        return "compression"
    return "preallocation" if dest.preallocation is not values.Preallocation.OFF else ""


def shown(text: str) -> str:
    """A caller's text in a form that fits into a message: valid, and not too long.

    A reply's metadata ends at 8 KiB, and a path may have half of that.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}…{text[-half:]}"


def _check_path_and_format(source: values.Source) -> None:
    check_path("source.path", source.path)
    if source.format:
        _check_format("source.format", source.format, values.FORMATS)


def _check_source(source: values.Source) -> None:
    _check_path_and_format(source)
    if source.format:
        _check_encryption("source", source.format, encrypted=source.encryption is not None)


def _check_dest(dest: values.Destination) -> None:
    check_path("dest.path", dest.path)
    if dest.path.rpartition("/")[2].startswith(TEMPORARY_PREFIX):
        raise _bad_path("dest.path", dest.path, "has a name that convertd keeps for itself")
    _check_format("dest.format", dest.format, values.WRITABLE_FORMATS)
    _check_compression(dest)
    _check_preallocation(dest)
    if dest.mode is not None and not 0 <= dest.mode == dest.mode & MODE_BITS:
        raise conditions.BadOption(field="dest.mode", problem="has bits outside of 0666")
    if dest.group and not _GROUP.fullmatch(dest.group):
        problem = "is neither the name nor the number of a group"
        raise conditions.BadOption(field="dest.group", problem=problem)


def check_path(field: str, path: str) -> None:
    """Check that a path can be meant.

    Raises:
        conditions.BadPath: it can't; the condition says why.
    """
    data = path.encode("utf-8", "surrogatepass")
    names = data.split(b"/")[1:]
    problems = {
        "is not valid UTF-8": data.decode("utf-8", "replace") != path,
        "has a NUL in it": "\0" in path,
        f"is longer than {MAX_PATH_BYTES} bytes": len(data) > MAX_PATH_BYTES,
        "is not absolute": not path.startswith("/"),
        "has '..' in it": b".." in names,
        "has an empty name or '.' in it": b"" in names or b"." in names,
        f"has a name longer than {MAX_NAME_BYTES} bytes": len(max(names, key=len, default=b""))
        > MAX_NAME_BYTES,
    }
    for problem, found in problems.items():
        if found:
            raise _bad_path(field, path, problem)


def _bad_path(field: str, path: str, problem: str) -> conditions.BadPath:
    return conditions.BadPath(field=field, path=shown(path), problem=problem)


def _check_format(field: str, name: str, usable: frozenset[str]) -> None:
    if name not in usable:
        raise conditions.BadFormat(field=field, format=shown(name))


def _check_encryption(end: str, name: str, *, encrypted: bool) -> None:
    """Hold passphrase and format together; Inspect of a `luks` image alone takes none."""
    field = f"{end}.encryption"
    if encrypted and name not in ENCRYPTABLE_FORMATS:
        raise conditions.BadOption(field=field, problem=f"is not possible with the format {name}")
    if name == "luks" and not encrypted:
        raise conditions.BadOption(field=field, problem="the format luks needs a passphrase")


def _check_compression(dest: values.Destination) -> None:
    if dest.compression is values.Compression.NONE:
        return
    if dest.compression not in _compressions_of(dest):
        problem = f"{dest.compression} is not possible with the format {dest.format}"
        raise conditions.BadOption(field="dest.compression", problem=problem)
    if dest.encryption is not None:
        problem = "can't be combined with encryption"
        raise conditions.BadOption(field="dest.compression", problem=problem)
    if dest.preallocation is not values.Preallocation.OFF:
        problem = "can't be combined with preallocation"
        raise conditions.BadOption(field="dest.compression", problem=problem)


def _compressions_of(dest: values.Destination) -> frozenset[values.Compression]:
    if dest.format == "qcow2":
        return frozenset(values.Compression)
    if dest.format == "vmdk" and STREAM_OPTIMIZED in dest.options:
        return frozenset({values.Compression.DEFAULT, values.Compression.ZLIB})
    return frozenset()


def _check_preallocation(dest: values.Destination) -> None:
    possible = PREALLOCATIONS.get(dest.format, frozenset({values.Preallocation.OFF}))
    if dest.preallocation not in possible:
        problem = f"{dest.preallocation} is not possible with the format {dest.format}"
        raise conditions.BadOption(field="dest.preallocation", problem=problem)


def _check_options(request: values.ConvertRequest) -> None:
    rate = request.rate_limit_bytes_per_second
    if rate and not LEAST_RATE_BYTES_PER_SECOND <= rate <= MAX_RATE_BYTES_PER_SECOND:
        problem = f"must be 0 (no limit), or at least {LEAST_RATE_BYTES_PER_SECOND}"
        raise conditions.BadOption(field="rate_limit_bytes_per_second", problem=problem)
    if request.reflink is values.Reflink.ALWAYS and (obstacle := reflink_obstacle(request)):
        raise conditions.BadOption(field="reflink", problem=f"always does not go with {obstacle}")
    label = request.label
    # What is printable has no lone surrogate, and so can be encoded.
    if not label.isprintable() or len(label.encode()) > MAX_LABEL_BYTES:
        problem = f"must be printable text of at most {MAX_LABEL_BYTES} bytes"
        raise conditions.BadOption(field="label", problem=problem)


def check_passphrase(field: str, passphrase: bytes) -> None:
    """Check the length of a passphrase.

    Raises:
        conditions.BadOption: it is empty or too long.
    """
    if not 1 <= len(passphrase) <= MAX_PASSPHRASE_BYTES:
        problem = f"must have 1 to {MAX_PASSPHRASE_BYTES} bytes"
        raise conditions.BadOption(field=field, problem=problem)
