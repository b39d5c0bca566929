"""The four functions of OpenStack Nova's `nova.privsep.qemu`, by convertd.

Names and arguments are those of Nova 34 (2026.2). The result is the same image, with the same cache
mode, also flushed. docs/client.md lists the differences; above all, the errors are this package's.

`convert_image` and `privileged_qemu_img_info` call the daemon, at $CONVERTD_SOCKET or its default
path; the policy must name the caller. The two `unprivileged_` functions need no daemon.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping
from typing import Final, cast

from convertd_client import (
    client,
    conversion,
    errors,
    eventlet_subprocess,
    local,
    results,
)

Encryption = Mapping[str, str]

DIRECT_BYTES: Final = 4096
"""How much Nova writes to test whether direct I/O works."""

NOT_COMPRESSED: Final = frozenset({"vmdk"})
"""Formats for which qemu-img accepts -c, but compresses nothing: Nova states no subformat, and a
monolithicSparse is not compressed (qemu 7.2). Others are refused, as by qemu-img."""

CREATE_MODE: Final = 0o644
"""The mode of files that qemu-img creates. Source: qemu block/file-posix.c, raw_co_create."""


def convert_image(  # noqa: PLR0913, PLR0917 - the arguments are Nova's
    source: str,
    dest: str,
    in_format: str | None,
    out_format: str,
    instances_path: str,
    compress: bool,  # noqa: FBT001 - as above
    src_encryption: Encryption | None = None,
    dest_encryption: Encryption | None = None,
) -> results.ConvertResult:
    """Convert an image with the daemon's rights. An existing `dest` is replaced.

    The daemon's policy sets the result's mode and owner. Nova's own function returns None; this one
    returns details, such as the cache mode.

    Raises:
        errors.Unimplemented: the encryption format is not `luks`.
        errors.ConvertError: see `errors`.
    """
    options = _options(in_format, out_format, instances_path, compress=compress)
    options.update(_secrets(src_encryption, dest_encryption))
    paths = conversion.absolute(source), conversion.absolute(dest)
    if eventlet_subprocess.is_needed():
        done = eventlet_subprocess.call("convert", *paths, dest_format=out_format, **options)
        return cast("results.ConvertResult", done)
    with client.Client() as daemon:
        return daemon.convert(*paths, dest_format=out_format, **options)


def unprivileged_convert_image(  # noqa: PLR0913, PLR0917 - the arguments are Nova's
    source: str,
    dest: str,
    in_format: str | None,
    out_format: str,
    instances_path: str,
    compress: bool,  # noqa: FBT001 - as above
    src_encryption: Encryption | None = None,
    dest_encryption: Encryption | None = None,
) -> results.ConvertResult:
    """Convert an image with the caller's own rights. An existing `dest` is replaced.

    The result's mode is the one that qemu-img would have set.

    Raises:
        errors.Unimplemented: the encryption format is not `luks`.
        errors.ConvertError: see `errors`.
    """
    options = _options(in_format, out_format, instances_path, compress=compress)
    options.update(_secrets(src_encryption, dest_encryption))
    options["mode"] = CREATE_MODE & ~_umask()
    return local.convert(source, dest, dest_format=out_format, **options)


def privileged_qemu_img_info(path: str, format: str | None = None) -> str:  # noqa: A002 - Nova's
    """`qemu-img info --output=json` of an image, with the daemon's rights: the JSON as text.

    Raises:
        errors.ConvertError: the image can't be read.
    """
    image = conversion.absolute(_image(path))
    if eventlet_subprocess.is_needed():
        return cast(
            "results.ImageInfo", eventlet_subprocess.call("inspect", image, format)
        ).qemu_img_json
    with client.Client() as daemon:
        return daemon.inspect(image, format).qemu_img_json


def unprivileged_qemu_img_info(path: str, format: str | None = None) -> str:  # noqa: A002 - Nova's
    """`qemu-img info --output=json` of an image, with the caller's own rights: the JSON as text.

    Raises:
        errors.ConvertError: the image can't be read.
    """
    return local.inspect(_image(path), format).qemu_img_json


def _options(
    in_format: str | None, out_format: str, instances_path: str, *, compress: bool
) -> conversion.ConvertOptions:
    return conversion.ConvertOptions(
        source_format=in_format,
        # As qemu-img's -c, whatever the policy prefers.
        compression="zlib" if compress and out_format not in NOT_COMPRESSED else None,
        cache_mode=_cache_mode(instances_path),
        overwrite=True,
        # As Nova's own helper does; the root in the policy has to allow it.
        accept_damaged=True,
    )


def _cache_mode(instances_path: str) -> str:
    """The cache mode with the effect of Nova's.

    Nova uses `none` if instances_path supports direct writes, else `writeback`. But the destination
    may be on another file system, and if that does not support them, Nova fails. So `auto` is used
    for `none`: it is `none` wherever that works. It is used too where the test is not permitted.
    """
    try:
        fd = os.open(instances_path, os.O_TMPFILE | os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # The errors that mean "no" to Nova. EOPNOTSUPP only means that there is no O_TMPFILE.
        return "writeback" if error.errno in {errno.EINVAL, errno.ENOENT} else "auto"
    try:
        with mmap.mmap(-1, DIRECT_BYTES) as block:
            os.write(fd, block)
    except OSError as error:
        return "writeback" if error.errno == errno.EINVAL else "auto"
    finally:
        os.close(fd)
    return "auto"


def _secrets(source: Encryption | None, dest: Encryption | None) -> conversion.ConvertOptions:
    """The passphrases. Nova's encryption parameters are the contract's defaults."""
    for asked in (source, dest):
        if asked and asked["format"] != "luks":
            raise errors.unsupported(f"encryption format {asked['format']!r}", "only LUKS is safe")
    options = conversion.ConvertOptions()
    if source:
        options["source_secret"] = source["secret"].encode()
    if dest:
        options["dest_secret"] = dest["secret"].encode()
    return options


def _image(path: str) -> str:
    """The image file of a ploop image, whose path is a directory. As Nova does."""
    if os.path.exists(os.path.join(path, "DiskDescriptor.xml")):
        return os.path.join(path, "root.hds")
    return path


def _umask() -> int:
    """The umask of this process. umask(2) would change it, for all threads."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        line = next(line for line in status if line.startswith("Umask:"))
    return int(line.split()[1], 8)
