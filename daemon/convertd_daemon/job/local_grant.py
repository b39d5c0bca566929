"""The grant of a caller without a daemon: whatever the caller's own rights allow.

Nothing is decided here that the kernel does not decide again: the job runs with its caller's uid
and no capability of the daemon's.
"""

from __future__ import annotations

import os
from typing import Final

from convertd_core import conditions, messages, validation, values

EVERYTHING: Final = values.Root(
    name="own", path="/", access=None, allow_ownerless=True, accept_damaged=True
)
"""A caller that converts with its own rights chose the file system itself, and is warned."""

RULE: Final = "own rights"


def grant(local: messages.LocalRequest) -> values.Grant:
    """Make the grant for a local request.

    Raises:
        conditions.ConvertError: the request is invalid; the same conditions as with a daemon.
    """
    if isinstance(local.request, values.ConvertRequest):
        return _convert(validation.checked_convert(local.request))
    return _inspect(validation.checked_inspect(local.request))


def _convert(request: values.ConvertRequest) -> values.ConvertGrant:
    if request.dest.is_zero:
        # A root of files has no devices.
        raise conditions.BadOption(field="dest.is_zero", problem="is for devices only")
    return values.ConvertGrant(
        rule=RULE,
        peer=_own_peer(),
        request=request,
        source=_place(request.source.path),
        dest=_place(request.dest.path),
        readable=(EVERYTHING,),
        read_formats=values.FORMATS,
        overwrite=values.OverwriteScope.ANY,
        limits=values.DEFAULT_LIMITS,
    )


def _inspect(request: values.InspectRequest) -> values.InspectGrant:
    return values.InspectGrant(
        rule=RULE,
        peer=_own_peer(),
        request=request,
        source=_place(request.source.path),
        readable=(EVERYTHING,),
        read_formats=values.FORMATS,
        limits=values.DEFAULT_LIMITS,
    )


def _own_peer() -> values.Peer:
    groups = frozenset(os.getgroups())
    return values.Peer(uid=os.geteuid(), gid=os.getegid(), groups=groups, pid=os.getpid())


def _place(path: str) -> values.Place:
    return values.Place(root=EVERYTHING, below=path.removeprefix("/"))
