"""An image and all it stands on: each member found, judged and kept open.

Fails closed. What an overlay's header says about its backing file is a wish of whoever wrote the
header. It is read as if the caller had asked for that path: below a root that the rule lets the
caller read, resolved by the kernel in the same way, of a format that the rule allows. A refusal is
the same whether the file exists or not, unless it lies where the caller may look anyway.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_daemon import channel, errors, model, validation
from convertd_daemon.job import damage, paths, probe

if TYPE_CHECKING:
    from convertd_daemon.job.qemu_img import Runner

MAX_MEMBERS: Final = 64
"""Deeper chains exist only by mistake or malice; each member takes a descriptor."""

MAX_SHOWN_BYTES: Final = 256
"""Longer values are cut in their middle on their way to a caller; a command must not be."""

BEING_WRITTEN: Final = model.Warned(
    reason="IMAGE_IN_USE",
    message="another process has it open for writing: what is told of it may be out of date",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One member of a chain: the open inode, and what it is."""

    source: paths.Source
    info: model.ImageInfo

    @property
    def member(self) -> model.Member:
        """The member without its descriptor."""
        return model.Member(path=self.source.place.path, info=self.info)


JobGrant = model.Grant | model.InspectGrant


def follow(
    grant: JobGrant, top: paths.Source, runner: Runner, stack: contextlib.ExitStack
) -> tuple[Link, ...]:
    """Find out what the source is and what it stands on, down to the base.

    Members are opened as they are found, and closed by `stack`.

    Raises:
        errors.FormatNotAllowed, errors.AmbiguousFormat, errors.FormatMismatch, errors.ImageRefused,
            errors.ImageInUse: of the source, or of a member.
        errors.ImageDamaged, errors.DamageNotAllowed: one says that it is corrupt; see damage.
        errors.BackingRefused: a member may not be read through this image, or can't be.
    """
    stated = grant.request.source.format
    links = [Link(source=top, info=probe.identify(top, stated, grant.read_formats, runner))]
    damage.check_mark(grant.request.source, links[-1])
    while links[-1].info.backing_name:
        links.append(below(grant, links, runner, stack))
        damage.check_mark(grant.request.source, links[-1])
    return tuple(links)


def describe(
    grant: model.InspectGrant, top: paths.Source, runner: Runner, stack: contextlib.ExitStack
) -> channel.Inspected:
    """What the image is, in qemu-img's own JSON too, and what it stands on as far as allowed.

    Raises:
        errors.ConvertError: as in follow, but only for the image itself.
    """
    path, stated = top.place.path, grant.request.source.format
    info, text = probe.describe(top, stated, grant.read_formats, runner, shared=True)
    contents = probe.contents(path, text)
    links = [Link(source=top, info=info)]
    warnings = [BEING_WRITTEN] if paths.is_being_written(top.fd) else []
    warnings += info.warnings
    try:
        while links[-1].info.backing_name:
            links.append(below(grant, links, runner, stack))
    except errors.ConvertError as error:
        # That a caller may not see the next member, or that it is broken, is an answer too: the
        # one that a conversion would get.
        failure = error.failure()
        warnings.append(model.Warned(reason=failure.reason, message=failure.message))
    return channel.Inspected(
        chain=tuple(link.member for link in links),
        complete=not links[-1].info.backing_name,
        raw_json=text,
        contents=contents,
        warnings=tuple(warnings),
    )


def check_encryption(asked: model.Source, link: Link) -> None:
    """Hold what was said about a passphrase against what the source is.

    Raises:
        errors.SecretMissing: the source is encrypted, and none was given.
        errors.BadOption: one was given, and the source is not encrypted.
    """
    if link.info.encrypted and not asked.encrypted:
        raise errors.SecretMissing(path=link.source.place.path)
    if asked.encrypted and not link.info.encrypted:
        raise errors.BadOption(field="source.encryption", problem="the image is not encrypted")


def below(grant: JobGrant, links: list[Link], runner: Runner, stack: contextlib.ExitStack) -> Link:
    """Open and judge what the last member stands on.

    Raises:
        errors.BackingRefused, errors.FormatNotAllowed, errors.ImageRefused, …: as in follow.
    """
    overlay = links[-1]
    refused = _Refusal(overlay.source.place.path, overlay.info.backing_name)
    if len(links) >= MAX_MEMBERS:
        raise refused.because(f"the chain has more than {MAX_MEMBERS} members")
    place = _place(grant, overlay, refused)
    try:
        source = stack.enter_context(paths.open_source(place, grant.peer))
    except errors.ConvertError as error:
        raise refused.because(str(error)) from error
    if any(_is_same(source, link.source) for link in links):
        raise refused.because("the chain is a loop")
    try:
        info = probe.identify(source, overlay.info.backing_format, grant.read_formats, runner)
    except errors.AmbiguousFormat as error:
        problem = f"it looks like {error.found}, and its overlay does not name its format"
        raise refused.because(problem) from error
    if not overlay.info.backing_format and info.format != "raw":
        # Old qemu probed here. A guest can write a header into a raw disk, so a probe that finds
        # one settles nothing; and to read it as raw when it is none would be garbage.
        raise refused.because(_without_format(overlay, info.format))
    if info.encrypted:
        raise refused.because("it is encrypted, and only the source itself may be")
    return Link(source=source, info=info)


def _without_format(overlay: Link, found: str) -> str:
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

    def because(self, problem: str) -> errors.BackingRefused:
        backing = validation.shown(self.backing)
        return errors.BackingRefused(path=self.path, backing=backing, problem=problem)


def _place(grant: JobGrant, overlay: Link, refused: _Refusal) -> model.Place:
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
    except errors.BadPath as error:
        raise refused.because(error.problem) from error
    roots = (*grant.readable, *grant.closed)
    around = [root for root in roots if root.contains(path)]
    root = max(around, key=lambda root: len(root.path), default=None)
    if root is None or root not in grant.readable:
        raise refused.because("it is not below a root that you may read")
    return model.Place(
        root=root,
        below=path.removeprefix(root.path).lstrip("/"),
        others=tuple(other for other in roots if other is not root),
    )


def _is_same(one: paths.Source, other: paths.Source) -> bool:
    return os.path.samestat(os.fstat(one.fd), os.fstat(other.fd))
