"""Check that systemd's confinement of the service allows what the policy grants.

A policy can't lift what the unit forbids. This reports it at the start, in the journal, before the
first caller meets it.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from convertd_core import values
from convertd_daemon.linux import openat2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.policy.load import Loaded

REMEDY: Final = "`convertd unit-dropin` prints what the service needs"


def problems(loaded: Loaded) -> Iterator[str]:
    """What the kernel would refuse of a policy's grants, as of when the policy was loaded."""
    policy = loaded.policy
    used = {root for rule in policy.rules for root in (*rule.read, *rule.write)}
    if used and not can_resolve():
        yield f"openat2(2) is refused, so no image can be opened: {REMEDY}"
    for root in sorted({root for rule in policy.rules for root in rule.write}, key=_path):
        if root.kind is values.RootKind.FILE and loaded.seen[root.name].is_read_only:
            yield f"roots.{root.name}.path: {root.path} is read-only for the service: {REMEDY}"


def _path(root: values.Root) -> str:
    return root.path


def can_resolve() -> bool:
    """Whether openat2(2) works here. systemd's RestrictSUIDSGID= refuses it."""
    try:
        no_links = openat2.Resolve.NO_SYMLINKS
        os.close(openat2.openat2(openat2.AT_FDCWD, "/", flags=os.O_PATH, resolve=no_links))
    except OSError as error:
        return error.errno not in {errno.ENOSYS, errno.EPERM}
    return True
