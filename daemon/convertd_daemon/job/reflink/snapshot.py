"""A chain as it is at one moment: its files' blocks, shared with files of the job's own.

FICLONE takes a file's blocks while nobody can write to it. So whatever its owner does afterwards,
the map of the image and its data stay those of that moment. The files have no name, and go with the
job.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, values
from convertd_daemon.job.files import file_dest, image_locks, paths, source_change, space
from convertd_daemon.job.reflink import eligibility
from convertd_daemon.linux import ioctl

if TYPE_CHECKING:
    import contextlib

    from convertd_daemon.job.endpoints import Endpoints
    from convertd_daemon.job.files.opened_source import Source
    from convertd_daemon.sandbox.identity import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A chain as it was, and what is to share its blocks.

    `ends` are as they were opened, but for what is read. `block_bytes` is the size of the file
    system's blocks. `scratch` is an empty file of the job's own, for a list.
    """

    ends: Endpoints
    dest: file_dest.FileDest
    block_bytes: int
    scratch: int


_CAN_NOT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS})


def take(
    grant: values.ConvertGrant,
    opened: Endpoints,
    dest: file_dest.FileDest,
    reader: Identity | None,
    stack: contextlib.ExitStack,
) -> Snapshot:
    """Give the same chain, of files that nobody changes, for `reader` to read. `stack` closes them.

    Each is what qemu-img described: neither its size nor its time moved since it was opened.

    Raises:
        conditions.ReflinkNotPossible: the file system does not share these files' blocks; or a
            backing file was touched just now.
        conditions.NoSpace, conditions.QuotaExceeded: there is no room for the metadata.
        conditions.SourceChanged: the source was written to since it was opened.
        conditions.ImageInUse: a qemu may write to one. qemu-img finds that only in what it opens.
    """
    try:
        block = os.fstatvfs(dest.fd).f_bsize
        _try_out(dest.fd, opened.source, block)
        sources = [_copied(grant, source, dest, reader, stack) for source in opened.sources]
        scratch = file_dest.open_scratch(grant, dest, None, stack)
    except OSError as error:
        space.raise_if_full(error, dest.target)
        raise eligibility.refusal(dest.place, _problem_of(error)) from error
    _check_unchanged(opened.sources)
    links = zip(opened.chain, sources, strict=True)
    chain = tuple(dataclasses.replace(link, source=source) for link, source in links)
    ends = dataclasses.replace(opened, chain=chain)
    return Snapshot(ends=ends, dest=dest, block_bytes=block, scratch=scratch)


def _try_out(dest: int, source: Source, block: int) -> None:
    """Share one block with the result, and take it out again."""
    length = min(block, source.size_bytes)
    try:
        ioctl.ficlonerange(dest, source.fd, dest_offset=0, source_offset=0, length=length)
    finally:
        os.ftruncate(dest, 0)


def _copied(
    grant: values.ConvertGrant,
    source: Source,
    dest: file_dest.FileDest,
    reader: Identity | None,
    stack: contextlib.ExitStack,
) -> Source:
    """The source, but of a file that shares its blocks. What is its own is open for reading only.

    qemu-img inherits the descriptor, and must not be able to write.
    """
    fd = file_dest.open_scratch(grant, dest, reader, stack)
    ioctl.ficlone(fd, source.fd)
    image = paths.reopen(fd, os.O_RDONLY)
    stack.callback(os.close, image)
    size = os.fstat(image).st_size
    return dataclasses.replace(source, fd=image, size_bytes=size, opened=None)


def _check_unchanged(sources: tuple[Source, ...]) -> None:
    for source in sources:
        if image_locks.is_being_written(source.fd):
            raise conditions.ImageInUse(path=source.place.path)
    source_change.check(sources[:1])
    for source in sources[1:]:
        try:
            source_change.check([source])
        except conditions.SourceChanged as changed:
            # It may just have been touched. qemu-img copes: see source_change.watched.
            raise eligibility.refusal(source.place, "the image changed just now") from changed


def _problem_of(error: OSError) -> str:
    if error.errno == errno.EXDEV:
        return "source and destination are in different file systems"
    if error.errno in _CAN_NOT:
        return "the file system does not share blocks"
    return f"the file system can't share these files' blocks: {os.strerror(error.errno or 0)}"
