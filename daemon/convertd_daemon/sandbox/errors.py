"""Why something is not confined, and therefore does not run.

SandboxError
├── LandlockMissing     this kernel has no Landlock, or it is switched off
├── FilterMissing       the seccomp filter can't be compiled: no libseccomp, or too old a one
├── CapabilityMissing   the process lacks a capability that it must keep
└── NotConfined         a step of the way into the sandbox failed; says which, with its errno
"""

import enum
import os
from collections.abc import Iterable

from convertd_daemon.linux.capabilities import Capability


class SandboxError(Exception):
    """Nothing was started, because it could not be confined."""


class LandlockMissing(SandboxError):
    """The kernel does not offer Landlock."""

    def __init__(self) -> None:
        super().__init__("this kernel has no landlock: 5.13 or newer with lsm=landlock is needed")


class FilterMissing(SandboxError):
    """The seccomp filter can't be compiled; `cause` is libseccomp's own reason."""

    def __init__(self, cause: str) -> None:
        self.cause = cause
        super().__init__(f"can't compile the seccomp filter: {cause}")


class CapabilityMissing(SandboxError):
    """The process lacks capabilities that it must keep: `missing`, all of them."""

    def __init__(self, missing: Iterable[int]) -> None:
        self.missing = tuple(Capability(number) for number in sorted(missing))
        names = ", ".join(f"CAP_{capability.name}" for capability in self.missing)
        super().__init__(f"this process lacks {names}")


class Stage(enum.Enum):
    """The steps into the sandbox; entry.py has their order."""

    PREPARE = "prepare"
    FORK = "fork"
    DESCRIPTORS = "descriptors"
    SIGNALS = "signals"
    IDENTITY = "identity"
    CAPABILITIES = "capabilities"
    NO_NEW_PRIVS = "no_new_privs"
    PARENT = "parent"
    LIMITS = "limits"
    LANDLOCK = "landlock"
    SECCOMP = "seccomp"
    EXEC = "exec"


class NotConfined(SandboxError):
    """A step into the sandbox failed, so the program was not started.

    `errno` is the kernel's answer to that step, and 0 where it did not come from the kernel.
    """

    def __init__(self, stage: Stage, error: int, detail: str = "") -> None:
        self.stage = stage
        self.errno = error
        self.detail = detail
        reason = os.strerror(error) if error else "no answer"
        text = f"not confined, so not run: {stage.value}: {reason}"
        super().__init__(f"{text} ({detail})" if detail else text)
