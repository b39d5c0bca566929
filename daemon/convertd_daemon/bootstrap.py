"""The first steps of the daemon, up to a front that is starting.

Nothing here may import much: the front, which has gRPC to load, starts only after it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convertd_daemon.linux import prctl
from convertd_daemon.sandbox import confine_broker, front_process, limits
from convertd_daemon.service import listen, preflight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convertd_daemon.sandbox.identity import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """What there is before the policy is read. All of it is undone at the end."""

    listener: listen.Listener
    private: str
    names: str
    front_user: Identity
    worker_user: Identity
    landlock_abi: int
    front: front_process.Started


@contextlib.contextmanager
def begin(socket_path: str) -> Iterator[Bootstrap]:
    """Listen, give up what root has too much, and start the front.

    Raises:
        StartError, SandboxError, OSError: the daemon can't start, and the one line why.
    """
    landlock_abi = preflight.check_kernel()
    front_user, worker_user = (
        preflight.user(preflight.FRONT_USER),
        preflight.user(preflight.WORKER_USER),
    )
    limits.raise_descriptors()
    limits.refuse_core_dumps()
    # Two directories of ours come beside the socket, also where systemd made that.
    socket_path = listen.trusted(socket_path)
    with contextlib.ExitStack() as undo:
        listener = listen.listen(socket_path)
        undo.callback(listener.close)
        private = preflight.private_directory(socket_path, front_user)
        undo.enter_context(preflight.kept(private))
        names = preflight.names_directory(socket_path)
        undo.enter_context(preflight.kept(names))
        confine_broker.narrow_broker()
        prctl.set_child_subreaper()
        front = front_process.start(front_user, private)
        undo.callback(front.end)
        yield Bootstrap(
            listener=listener,
            private=private,
            names=names,
            front_user=front_user,
            worker_user=worker_user,
            landlock_abi=landlock_abi,
            front=front,
        )
