"""The grant that somebody has without a daemon: to whatever its own rights allow.

Nothing is decided here that the kernel does not decide again: the job runs with its caller's uid
and no capability of the daemon's.
"""

from __future__ import annotations

import os
from typing import Final

from convertd_daemon import channel, errors, model, validation

EVERYTHING: Final = model.Root(
    name="own", path="/", access=model.Access.OWN, allow_ownerless=True, accept_damaged=True
)
"""Whoever converts with its own rights chose the file system itself, and is warned."""

RULE: Final = "own rights"


def grant(order: channel.Order) -> model.Grant | model.InspectGrant:
    """Make the grant that an order amounts to.

    Raises:
        errors.Invalid: the request can't be meant; the same conditions as with a daemon.
    """
    if order.convert is not None:
        return _convert(validation.checked_convert(order.convert))
    if order.inspect is not None:
        return _inspect(validation.checked_inspect(order.inspect))
    raise errors.BadMessage(problem="an order without a request")


def _convert(request: model.ConvertRequest) -> model.Grant:
    if request.dest.is_zero:
        # A root of files has no devices.
        raise errors.BadOption(field="dest.is_zero", problem="is for devices only")
    return model.Grant(
        rule=RULE,
        peer=_me(),
        request=request,
        source=_place(request.source.path),
        dest=_place(request.dest.path),
        readable=(EVERYTHING,),
        read_formats=model.FORMATS,
        overwrite=model.Overwrite.ANY,
        limits=model.Limits(),
    )


def _inspect(request: model.InspectRequest) -> model.InspectGrant:
    return model.InspectGrant(
        rule=RULE,
        peer=_me(),
        request=request,
        source=_place(request.source.path),
        readable=(EVERYTHING,),
        read_formats=model.FORMATS,
        limits=model.Limits(),
    )


def _me() -> model.Peer:
    groups = frozenset(os.getgroups())
    return model.Peer(uid=os.geteuid(), gid=os.getegid(), groups=groups, pid=os.getpid())


def _place(path: str) -> model.Place:
    return model.Place(root=EVERYTHING, below=path.removeprefix("/"))
