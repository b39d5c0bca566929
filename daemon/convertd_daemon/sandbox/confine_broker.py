"""The broker's own confinement: seven capabilities and no way to more. Fails closed."""

import errno
from typing import Final

from convertd_daemon.linux import capabilities, prctl
from convertd_daemon.linux.capabilities import Capability
from convertd_daemon.sandbox import errors

BROKER: Final = frozenset(
    {
        Capability.CHOWN,
        Capability.DAC_OVERRIDE,
        Capability.DAC_READ_SEARCH,
        Capability.FOWNER,
        Capability.KILL,
        Capability.SETGID,
        Capability.SETUID,
    }
)
"""KILL: without it a qemu-img, which has another uid, can't be ended, nor dies with its job."""

_HIGHEST: Final = 63


def narrow_broker() -> None:
    """Keep BROKER in the permitted and effective sets, nothing anywhere else, no_new_privs set.

    Call it with one thread: the sets are each thread's own. Done twice it changes nothing.

    Raises:
        CapabilityMissing: one of BROKER is not permitted, or the bounding set has others and
            CAP_SETPCAP to drop them is missing.
    """
    had = capabilities.capget()
    if missing := BROKER - had.permitted:
        raise errors.CapabilityMissing(missing)
    _bound(had)
    prctl.cap_ambient_clear_all()
    capabilities.capset(capabilities.Sets(effective=BROKER, permitted=BROKER))
    prctl.set_no_new_privs()
    kept = capabilities.capget()
    if kept != capabilities.Sets(effective=BROKER, permitted=BROKER):
        raise PermissionError(errno.EPERM, f"the kernel left more capabilities: {kept}")


def _bound(had: capabilities.Sets) -> None:
    surplus = [number for number in range(_HIGHEST + 1) if number not in BROKER and _bounds(number)]
    if surplus and Capability.SETPCAP not in had.effective:
        raise errors.CapabilityMissing({Capability.SETPCAP})
    for number in surplus:
        prctl.capbset_drop(number)


def _bounds(number: int) -> bool:
    try:
        return prctl.capbset_read(number)
    except OSError:
        return False  # this kernel has no such capability
