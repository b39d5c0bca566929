"""Whether a result may share blocks with its source, as far as that is known for nothing.

Whether the file system can is found by trying (snapshot), and whether the data can be shared by a
map of it (mapping).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from convertd_core import conditions, validation, values
from convertd_daemon.job.files import file_dest
from convertd_daemon.job.reflink import qcow2_writer

if TYPE_CHECKING:
    from convertd_daemon.job.endpoints import Endpoints

FORMATS: Final = frozenset({"raw", "qcow2"})
"""The formats whose data can be shared, on either side."""

SHAREABLE: Final = "and only raw and qcow2 can share data"


def refusal(place: values.Place, problem: str) -> conditions.ReflinkNotPossible:
    """The condition that blocks can't be shared, for a reason that lies in one place."""
    return conditions.ReflinkNotPossible(path=place.path, problem=problem)


def check(grant: values.ConvertGrant, opened: Endpoints) -> file_dest.FileDest:
    """Find out whether a request and its images allow it; gives the file that would share blocks.

    Raises:
        conditions.ReflinkNotPossible: no.
    """
    dest = opened.dest
    _check_request(grant.request, dest.place)
    for place in (*(source.place for source in opened.sources), dest.place):
        if place.root.kind is values.RootKind.BLOCK:
            raise refusal(place, "a block device has no blocks to share")
        if not place.root.reflink:
            raise refusal(place, f"the policy does not allow it in the root {place.root.name}")
    for link in opened.chain:
        if link.info.format not in FORMATS:
            raise refusal(link.source.place, f"the image is {link.info.format}, {SHAREABLE}")
    if not isinstance(dest, file_dest.FileDest):
        raise refusal(dest.place, "the destination is no file")
    block = os.fstatvfs(dest.fd).f_bsize
    for link in opened.chain:
        if link.info.cluster_size_bytes % block:
            problem = f"the image's data is not aligned to blocks of {block} bytes"
            raise refusal(link.source.place, problem)
    if grant.request.dest.format != "raw":
        _check_writable(grant.request.dest, dest.place, block)
    return dest


def _check_request(request: values.ConvertRequest, dest: values.Place) -> None:
    if request.reflink is values.Reflink.NEVER:
        raise refusal(dest, "the request asks for a copy")
    if obstacle := validation.reflink_obstacle(request):
        raise refusal(dest, f"not possible with {obstacle}")
    if request.dest.format not in FORMATS:
        raise refusal(dest, f"the result is to be {request.dest.format}, {SHAREABLE}")


def _check_writable(asked: values.Destination, dest: values.Place, block: int) -> None:
    """Find out whether the writer of qcow2 can make what was asked for, in such blocks."""
    if problem := qcow2_writer.problem(asked):
        raise refusal(dest, problem)
    if qcow2_writer.creation(asked).cluster_bytes % block:
        problem = f"the result's clusters are smaller than the file system's blocks ({block})"
        raise refusal(dest, problem)
