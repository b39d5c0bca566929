"""Convert with the caller's own rights, without the daemon and without root.

The caller itself runs the job program that the daemon runs for each conversion: the same steps,
qemu-img in the same sandbox, the same guarantee that `dest` appears complete or not at all. Each
call starts one process and waits for its end. Needs qemu-img, and a kernel with Landlock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

from convertd_client import (
    conversion,
    job,
    results,
)
from convertd_core import values


def convert(
    source: conversion.Path,
    dest: conversion.Path,
    *,
    dest_format: str,
    on_progress: Callable[[results.Progress], None] | None = None,
    timeout: float | None = None,
    **options: Unpack[conversion.ConvertOptions],
) -> results.ConvertResult:
    """Convert the image `source` into a new image `dest`, which appears complete or not at all.

    Paths may be relative. Otherwise as `Client.convert`.

    Raises:
        errors.ConvertError: see `errors`.
    """
    return conversion_of(source, dest, dest_format, options).run(on_progress, timeout)


def conversion_of(
    source: conversion.Path,
    dest: conversion.Path,
    dest_format: str,
    options: conversion.ConvertOptions,
) -> job.Conversion:
    """Prepare a conversion, which another thread can cancel while it runs.

    Raises:
        errors.InvalidArgument: the request is invalid.
        errors.Unimplemented: there is no qemu-img.
    """
    paths = conversion.absolute(source), conversion.absolute(dest)
    asked = conversion.asked(*paths, dest_format, options)
    return job.Conversion(job.encoded(asked.request), asked.secrets)


def inspect(
    path: conversion.Path,
    format: str | None = None,  # noqa: A002 - the contract's word, and Nova's
    *,
    timeout: float | None = None,
) -> results.ImageInfo:
    """Describe the image at `path`. Only its headers are read.

    Raises:
        errors.ConvertError: see `errors`.
    """
    text = conversion.path_text("source.path", conversion.absolute(path))
    request = values.InspectRequest(source=values.Source(path=text, format=format or ""))
    return job.inspect(job.encoded(request), timeout)
