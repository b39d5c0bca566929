"""What a job needs to know before it can start qemu-img in the sandbox."""

from dataclasses import dataclass

from convertd_daemon.sandbox.identity import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Which qemu-img there is, as whom it runs, and its compiled seccomp filter.

    An identity of None keeps the job's own rights. `names` is a directory that the worker can pass
    through and only the job can write, for links; empty: the system's for temporary files.
    """

    path: str
    identity: Identity | None
    seccomp: bytes
    names: str = ""
