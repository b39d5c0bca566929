"""An image and its backing chain: each member is found, judged and kept open.

Fails closed. A backing file that an overlay's header names is treated as if the caller had asked
for that path: it must lie below a root that the rule lets the caller read, is resolved by the
kernel in the same way, and must have a format that the rule allows. A refusal is the same whether
the file exists or not, unless the caller may read there anyway.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, results, validation, values
from convertd_daemon.job import damage, stages
from convertd_daemon.job.files import image_locks, opened_source, paths
from convertd_daemon.job.qemu import image_info
from convertd_daemon.policy import places

if TYPE_CHECKING:
    from convertd_daemon.job.qemu.execution import Runner

MAX_MEMBERS: Final = 64
"""Deeper chains exist only by mistake or malice; each member takes a descriptor."""

MAX_SHOWN_BYTES: Final = 256
"""Longer values are cut in their middle on their way to a caller; a command must not be."""

BEING_WRITTEN: Final = results.Warning(
    reason="IMAGE_IN_USE",
    message="another process has it open for writing: this information may be out of date",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainLink:
    """One member of a chain: the open inode, and what it is."""

    source: opened_source.Source
    info: stages.ProbedImage

    @property
    def member(self) -> stages.ChainMember:
        """The member without its descriptor."""
        return stages.ChainMember(path=self.source.place.path, info=self.info)


def follow(
    grant: values.Grant, top: opened_source.Source, runner: Runner, stack: contextlib.ExitStack
) -> tuple[ChainLink, ...]:
    """Find out what the source is, and follow its backing chain down to the base.

    Members are opened as they are found, and closed by `stack`.

    Raises:
        conditions.FormatNotAllowed, conditions.AmbiguousFormat, conditions.FormatMismatch,
            conditions.ImageRefused,
            conditions.ImageInUse: of the source, or of a member.
        conditions.ImageDamaged, conditions.DamageNotAllowed: one says that it is corrupt; see
            damage.
        conditions.BackingRefused: a member may not be read through this image, or can't be.
    """
    stated = grant.request.source.format
    links = [
        ChainLink(source=top, info=image_info.identify(top, stated, grant.read_formats, runner))
    ]
    damage.check_mark(grant.request.source, links[-1].source, links[-1].info)
    while links[-1].info.backing_name:
        links.append(open_parent(grant, links, runner, stack))
        damage.check_mark(grant.request.source, links[-1].source, links[-1].info)
    return tuple(links)


def describe(
    grant: values.InspectGrant,
    top: opened_source.Source,
    runner: Runner,
    stack: contextlib.ExitStack,
) -> results.ImageInfo:
    """What the image is, in qemu-img's own JSON too, and its backing chain as far as allowed.

    Raises:
        conditions.ConvertError: as in follow, but only for the image itself.
    """
    path, stated = top.place.path, grant.request.source.format
    info, text = image_info.describe(top, stated, grant.read_formats, runner, shared=True)
    contents = image_info.contents(path, text)
    links = [ChainLink(source=top, info=info)]
    warnings = [BEING_WRITTEN] if image_locks.is_being_written(top.fd) else []
    warnings += info.warnings
    try:
        while links[-1].info.backing_name:
            links.append(open_parent(grant, links, runner, stack))
    except conditions.ConvertError as error:
        # That a caller may not see the next member, or that it is broken, is an answer too: the
        # one that a conversion would get.
        failure = error.failure()
        warnings.append(results.Warning(reason=failure.reason, message=failure.message))
    return results.ImageInfo(
        path=path,
        format=info.format,
        virtual_size_bytes=info.virtual_size_bytes,
        actual_size_bytes=info.actual_size_bytes,
        cluster_size_bytes=info.cluster_size_bytes,
        encrypted=info.encrypted,
        dirty=info.dirty,
        corrupt=info.corrupt,
        compressed=contents.compressed,
        backing_filename=info.backing_name,
        backing_format=info.backing_format,
        backing_chain=tuple(link.member.reported for link in links[1:]),
        backing_chain_complete=not links[-1].info.backing_name,
        snapshots=contents.snapshots,
        bitmaps=contents.bitmaps,
        format_specific=dict(info.details),
        qemu_img_json=text,
        warnings=tuple(warnings),
    )


def check_encryption(asked: values.Source, link: ChainLink) -> None:
    """Compare the request's passphrase with the source's encryption.

    Raises:
        conditions.SecretMissing: the source is encrypted, and none was given.
        conditions.BadOption: one was given, and the source is not encrypted.
    """
    if link.info.encrypted and asked.encryption is None:
        raise conditions.SecretMissing(path=link.source.place.path)
    if asked.encryption is not None and not link.info.encrypted:
        raise conditions.BadOption(field="source.encryption", problem="the image is not encrypted")


def open_parent(
    grant: values.Grant, links: list[ChainLink], runner: Runner, stack: contextlib.ExitStack
) -> ChainLink:
    """Open and judge the backing file of the last member.

    Raises:
        conditions.BackingRefused, conditions.FormatNotAllowed, conditions.ImageRefused, …: as in
            follow.
    """
    overlay = links[-1]
    refused = _Refusal(overlay.source.place.path, overlay.info.backing_name)
    if len(links) >= MAX_MEMBERS:
        raise refused.because(f"the chain has more than {MAX_MEMBERS} members")
    place = _place(grant, overlay, refused)
    try:
        source = stack.enter_context(paths.open_source(place, grant.peer))
    except conditions.ConvertError as error:
        raise refused.because(str(error)) from error
    if any(_is_same(source, link.source) for link in links):
        raise refused.because("the chain is a loop")
    try:
        info = image_info.identify(source, overlay.info.backing_format, grant.read_formats, runner)
    except conditions.AmbiguousFormat as error:
        problem = f"it looks like {error.found}, and its overlay does not name its format"
        raise refused.because(problem) from error
    if not overlay.info.backing_format and info.format != "raw":
        # Old qemu probed here. A guest can write a header into a raw disk, so a probe that finds
        # one settles nothing; and to read it as raw when it is none would be garbage.
        raise refused.because(_without_format(overlay, info.format))
    if info.encrypted:
        raise refused.because("it is encrypted, and only the source itself may be")
    return ChainLink(source=source, info=info)


def _without_format(overlay: ChainLink, found: str) -> str:
    """Say how an overlay is given its backing file's format, if all of that can be shown.

    Without -b, `rebase` takes the backing file's name away, and half of the disk with it.
    """
    path, info = overlay.source.place.path, overlay.info
    words = ("rebase", "-u", "-f", info.format, "-b", info.backing_name, "-F", found, path)
    problem = f"its overlay does not name its format; set it: {shlex.join(('qemu-img', *words))}"
    if len(problem.encode()) <= MAX_SHOWN_BYTES and problem.isprintable():
        return problem
    return f"its overlay does not name its format, which was found to be {found}"


@dataclass(frozen=True, slots=True)
class _Refusal:
    path: str
    backing: str

    def because(self, problem: str) -> conditions.BackingRefused:
        backing = validation.shown(self.backing)
        return conditions.BackingRefused(path=self.path, backing=backing, problem=problem)


def _place(grant: values.Grant, overlay: ChainLink, refused: _Refusal) -> values.Place:
    """Where the overlay's header leads, if the rule lets the caller read there."""
    name = overlay.info.backing_name
    # As qemu tells a protocol: a colon before the first slash. Source: qemu path_has_protocol().
    if ":" in name.partition("/")[0]:
        raise refused.because("it is not the plain name of a file")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(overlay.source.place.path), name))
    # normpath keeps two leading slashes, as POSIX wants.
    path = "/" + path.lstrip("/")
    try:
        validation.check_path("backing", path)
    except conditions.BadPath as error:
        raise refused.because(error.problem) from error
    place = places.place_of(path, (*grant.readable, *grant.closed))
    if place is None or place.root not in grant.readable:
        raise refused.because("it is not below a root that you may read")
    return place


def _is_same(one: opened_source.Source, other: opened_source.Source) -> bool:
    return os.path.samestat(os.fstat(one.fd), os.fstat(other.fd))
