"""Who a confined process is: its uid, gid, groups, and at most one capability. Fails closed."""

import errno
import os
from collections.abc import Collection
from dataclasses import dataclass

from convertd_daemon.linux import capabilities, prctl
from convertd_daemon.linux.capabilities import Capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A user to become, never root. `groups` are all its supplementary groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse root, as uid or as a group."""
        if self.uid <= 0 or self.gid <= 0 or any(group <= 0 for group in self.groups):
            raise ValueError(f"not an identity to confine a process with: {self}")


def assume(identity: Identity, *, keep: Collection[Capability] = ()) -> None:
    """Become `identity` in all of real, effective and saved ids, with no way back.

    `keep` stays permitted, for limit_capabilities() to deal with; the effective set is empty.
    Disarms PR_SET_PDEATHSIG.

    Raises:
        OSError: CAP_SETUID or CAP_SETGID is missing; the ids may be half changed: exit.
    """
    prctl.set_keepcaps(keep=bool(keep))
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    prctl.set_keepcaps(keep=False)
    if os.getresuid() != (identity.uid,) * 3 or os.getresgid() != (identity.gid,) * 3:
        raise PermissionError(errno.EPERM, f"the kernel did not make us {identity}")


def limit_capabilities(keep: Collection[Capability]) -> None:
    """Keep exactly these capabilities, through execve(2) too, and give up all others.

    Raises:
        OSError: EPERM, one of them is not permitted to this process.
    """
    kept = frozenset(int(capability) for capability in keep)
    prctl.cap_ambient_clear_all()
    capabilities.capset(capabilities.Sets(effective=kept, permitted=kept, inheritable=kept))
    for capability in kept:
        prctl.cap_ambient_raise(capability)
    if capabilities.capget().permitted != kept:
        raise PermissionError(errno.EPERM, "the kernel left capabilities that were given up")
