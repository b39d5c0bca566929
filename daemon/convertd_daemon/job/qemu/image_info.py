"""What an image is: qemu-img's answer, given inside the sandbox, and our judgement of it.

There is no parser of image formats here. qemu parses, the kernel contains it, we judge what it
says. What qemu-img writes to standard error about opening goes to the journal alone: it tells which
files exist on the host.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from convertd_core import conditions, results
from convertd_daemon.job import stages
from convertd_daemon.job.qemu import (
    execution,
    plan,
    reasons,
    recognize,
)
from convertd_daemon.sandbox import limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.job.files.opened_source import Source
    from convertd_daemon.job.qemu.execution import Outcome

log = logging.getLogger(__name__)

NAMES_A_FILE: Final = frozenset({"filename", "data-file"})
"""The keys of format-specific information under which qemu tells the name of another file."""

MAX_SIZE_BYTES: Final = 2**63 - 1
"""What off_t holds."""

NO_PARENT: Final = 2**32 - 1
"""The id of a parent that a VMDK without one has."""

LOCKED: Final = "lock"
NOT_THIS_FORMAT: Final = re.compile(
    r"(image|volume) (is )?not in \w+ format( \(bad signature \w+\))?"
    r"|file is too small, not a valid image|invalid vmdk image descriptor"
    r"|invalid vpc image|file too small for a vhd header"
)
"""All that qemu-img says after the image's own name; never a part of it. An image can have it say
"Not a directory" of a file that it names, which would tell that the file exists."""
NO_MEMORY: Final = "cannot allocate memory"

STRANGE: Final = "qemu-img describes it in a way that convertd does not understand"
NS_PER_S: Final = 10**9
EPOCH: Final = datetime.datetime.fromtimestamp(0, tz=datetime.UTC)

MAX_NS: Final = 2**64 - 1
"""What a qcow2 has room for: the clock of a machine; a date has 32 bits for seconds."""


def identify(
    source: Source, stated: str, allowed: frozenset[str], runner: execution.Runner
) -> stages.ProbedImage:
    """Find out what the source is, as far as this caller may have it read.

    qemu-img is not run on a raw one.

    Raises:
        conditions.FormatNotAllowed: it is of a format that the policy does not allow.
        conditions.AmbiguousFormat, conditions.FormatMismatch, conditions.ImageRefused,
            conditions.ImageInUse,
        conditions.Unsupported, conditions.ReadFailed: as they say; the same whether or not a file
            that the image names exists.
    """
    image_format = recognize.format_of(source, stated, allowed)
    if image_format == "raw":
        return plan.raw_info(source.size_bytes, source.allocated_bytes)
    return _describe(source, stated, image_format, runner)[0]


def describe(
    source: Source,
    stated: str,
    allowed: frozenset[str],
    runner: execution.Runner,
    *,
    shared: bool = False,
) -> tuple[stages.ProbedImage, str]:
    """What qemu-img says of an image, typed, and its own JSON; `shared`: even if it is in use.

    Raises:
        conditions.ConvertError: as in identify.
    """
    image_format = recognize.format_of(source, stated, allowed)
    return _describe(source, stated, image_format, runner, shared=shared)


def _describe(
    source: Source,
    stated: str,
    image_format: str,
    runner: execution.Runner,
    *,
    shared: bool = False,
) -> tuple[stages.ProbedImage, str]:
    recognize.check_alone(source, image_format)
    inodes = execution.Inodes(read=(source.fd,))
    argv = plan.info_argv(source.fd, image_format, shared=shared)
    outcome = runner.run(argv, inodes, limits.INFO)
    path = source.place.path
    if outcome.status != 0:
        log.info("info failed path=%r status=%d stderr=%r", path, outcome.status, outcome.excerpt)
        raise _refusal(source, stated, image_format, argv[-1], outcome)
    try:
        answer = json.loads(outcome.stdout)
        # JSON can escape half a character, which no message can hold.
        json.dumps(answer, ensure_ascii=False).encode()
        info = _parse(answer, source)
        is_elsewhere = _is_elsewhere(answer, source)
    except NOT_UNDERSTOOD as error:
        log.info("info unreadable path=%r error=%r", path, str(error))
        raise conditions.ImageRefused(path=path, problem=STRANGE) from error
    if info.format != image_format:
        raise conditions.FormatMismatch(path=path, format=image_format)
    _judge(path, info, is_elsewhere=is_elsewhere)
    info = replace(info, warnings=recognize.check_header(source, info.format))
    return info, json.dumps({**answer, "filename": path})


def contents(path: str, text: str) -> stages.Contents:
    """What more there is to tell of an image, from the text that `describe` gave of it.

    Raises:
        conditions.ImageRefused: it is not what a qemu-img says.
    """
    try:
        return _contents(json.loads(text))
    except NOT_UNDERSTOOD as error:
        log.info("info unreadable path=%r error=%r", path, str(error))
        raise conditions.ImageRefused(path=path, problem=STRANGE) from error


def result_info(fd: int, image_format: str, runner: execution.Runner) -> tuple[str, int]:
    """Format and virtual size in bytes of what was written; ("", 0) if qemu-img can't read it."""
    argv = plan.info_argv(fd, image_format)
    outcome = runner.run(argv, execution.Inodes(read=(fd,)), limits.INFO)
    if outcome.status != 0:
        log.warning("result unreadable format=%s stderr=%r", image_format, outcome.excerpt)
        return "", 0
    try:
        found = json.loads(outcome.stdout)
        return str(found["format"]), int(found["virtual-size"])
    except NOT_UNDERSTOOD as error:
        log.warning("result not understood format=%s error=%r", image_format, str(error))
        return "", 0


def _refusal(
    source: Source, stated: str, image_format: str, named: str, outcome: Outcome
) -> conditions.ConvertError:
    """Why it could not be opened; `named` is the name that qemu-img was given for it."""
    path, output = source.place.path, outcome.stderr.lower()
    if LOCKED in output and "failed to get" in output:
        return conditions.ImageInUse(path=path)
    if NO_MEMORY in output:
        return conditions.ImageRefused(
            path=path, problem="reading it takes more memory than allowed"
        )
    if outcome.status < 0:
        return conditions.ImageRefused(path=path, problem="qemu-img crashed while reading it")
    opening = f"qemu-img: could not open '{named}': "
    if stated and NOT_THIS_FORMAT.fullmatch(output.removeprefix(opening)):
        return conditions.FormatMismatch(path=path, format=stated)
    problem = reasons.of_opening(outcome.stderr, named)
    if problem is None:
        problem = f"qemu-img can't open it as {image_format} by itself"
        if source.place.root.access is None:
            problem = f"{problem}: {reasons.unknown(outcome.stderr, source.place)}"
    return conditions.ImageRefused(path=path, problem=problem)


NOT_UNDERSTOOD: Final = (
    *(ValueError, TypeError, KeyError),
    *(AttributeError, OverflowError, RecursionError),
)
"""What the answer of a qemu-img that an image has taken over may raise when it is read."""


def _is_elsewhere(answer: dict[str, Any], source: Source) -> bool:
    """Whether another file has the data, also one that is not named.

    qcow2's external data file; an extent or an unnamed parent of a VMDK; what a LUKS header is for.
    """
    specific = answer.get("format-specific", {}).get("data", {})
    extents = {str(extent["filename"]) for extent in specific.get("extents", ())}
    has_parent = specific.get("parent-cid", NO_PARENT) != NO_PARENT
    return (
        not {"data-file", "data-file-raw"}.isdisjoint(specific)
        or not extents <= {plan.path_of(source.fd)}
        or (has_parent and not answer.get("backing-filename"))
        or (answer["format"] == "luks" and answer["virtual-size"] == 0)
    )


def _judge(path: str, info: stages.ProbedImage, *, is_elsewhere: bool) -> None:
    """Refuse what convertd does not convert, whatever qemu-img might make of it."""
    if is_elsewhere:
        raise conditions.ImageRefused(path=path, problem="its data is in another file")
    if info.encrypted and dict(info.details).get("encrypt.format", "luks") != "luks":
        raise conditions.Unsupported(what=f"{path}: its encryption", why="only LUKS is safe")


def _parse(answer: dict[str, Any], source: Source) -> stages.ProbedImage:
    """qemu-img's ImageInfo, as far as we use it. Source: qemu qapi/block-core.json."""
    specific = answer.get("format-specific", {}).get("data", {})
    return stages.ProbedImage(
        format=str(answer["format"]),
        virtual_size_bytes=_size(answer["virtual-size"]),
        actual_size_bytes=_size(answer.get("actual-size", source.allocated_bytes)),
        cluster_size_bytes=_size(answer.get("cluster-size", 0)),
        encrypted=bool(answer.get("encrypted", False)),
        dirty=bool(answer.get("dirty-flag", False)),
        corrupt=bool(specific.get("corrupt", False)),
        backing_name=str(answer.get("backing-filename", "")),
        backing_format=str(answer.get("backing-filename-format", "")),
        snapshots=tuple(str(item["name"]) for item in answer.get("snapshots", ())),
        bitmaps=tuple(str(item["name"]) for item in specific.get("bitmaps", ())),
        details=tuple(_flat("", specific)),
    )


def _contents(answer: dict[str, Any]) -> stages.Contents:
    """Source: qemu qapi/block-core.json: SnapshotInfo, Qcow2BitmapInfo, VmdkExtentInfo."""
    specific = answer.get("format-specific", {}).get("data", {})
    return stages.Contents(
        snapshots=tuple(
            results.Snapshot(
                id=_text(item["id"]),
                name=_text(item["name"]),
                vm_state_size_bytes=_size(item["vm-state-size"]),
                create_time=EPOCH
                + datetime.timedelta(microseconds=_nanoseconds(item, "date") // 1000),
                vm_clock_seconds=_nanoseconds(item, "vm-clock") / NS_PER_S,
            )
            for item in answer.get("snapshots", ())
        ),
        bitmaps=tuple(
            results.Bitmap(
                name=_text(item["name"]),
                granularity_bytes=_size(item["granularity"]),
                flags=tuple(_text(flag) for flag in item["flags"]),
            )
            for item in specific.get("bitmaps", ())
        ),
        compressed=any(extent.get("compressed") is True for extent in specific.get("extents", ())),
    )


def _nanoseconds(item: dict[str, Any], name: str) -> int:
    """A time in two parts. A header may have more nanoseconds than there are in a second."""
    total = _size(item[f"{name}-sec"]) * NS_PER_S + _size(item[f"{name}-nsec"])
    if total > MAX_NS:
        raise ValueError(f"not a time: {total!r:.40}")
    return total


def _text(value: object) -> str:
    if type(value) is not str:
        raise TypeError(f"not a text: {value!r:.40}")
    return value


def _size(value: object) -> int:
    """A number of bytes that can be one. A vpc's header can have qemu-img print a negative one."""
    if type(value) is not int or not 0 <= value <= MAX_SIZE_BYTES:
        raise ValueError(f"not a size: {value!r:.40}")
    return value


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    """What only the format has, its nested keys joined by dots, without the names of files."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in sorted(value.items())]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)
        return
    for key, item in items:
        if key not in NAMES_A_FILE:
            yield from _flat(f"{prefix}.{key}" if prefix else key, item)
